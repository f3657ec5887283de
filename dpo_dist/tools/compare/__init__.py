"""Ask two models the same prompts."""
