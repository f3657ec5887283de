"""A small model that DPO teaches a rule one can see in its text; `scripts/quickstart.sh` runs it."""
