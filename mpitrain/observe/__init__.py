"""What a person and other programs see of a run."""
