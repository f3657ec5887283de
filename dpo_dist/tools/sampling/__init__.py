"""Ask models for responses, and judges for scores."""
