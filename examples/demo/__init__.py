"""A demo: DPO teaches a small model a rule that readers can see in its answers (`scripts/quickstart.sh`)."""
