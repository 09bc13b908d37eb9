"""What users get wrong: each case through the real command lines, down to what is left on disk."""
