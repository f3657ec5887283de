"""A run of the selftest: `dpo_dist.train` without overlapping communication with computing."""

from dpo_dist.foundation.signals import end_at_signals

if __name__ == "__main__":
    end_at_signals()  # the imports take seconds

from dpo_dist.config.command_line import run_verb
from dpo_dist.train import main

if __name__ == "__main__":
    from dpo_dist.distributed import deepspeed_config

    deepspeed_config.OVERLAPS = False
    run_verb(main)
