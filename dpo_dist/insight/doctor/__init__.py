"""The doctor: checks of preference data before GPUs are spent."""
