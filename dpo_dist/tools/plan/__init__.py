"""Memory and hours of a run on GPUs that are not there."""
