"""How fast is it, beside what people would use instead."""
