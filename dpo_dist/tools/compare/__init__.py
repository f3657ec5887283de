"""Ask several models the same prompts."""
