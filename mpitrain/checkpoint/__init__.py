"""What a run resumes from: whole or absent."""
