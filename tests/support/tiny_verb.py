"""The smallest verb: prints the run directory. `run.name=fail` is a bug, `run.name=stop` is Ctrl-C."""

from dpo_dist.config.command_line import run_verb
from dpo_dist.config.schema import RunConfig


def main(config: RunConfig) -> int:
    if config.run.name == "fail":
        raise RuntimeError("a bug of the program")
    if config.run.name == "stop":
        raise KeyboardInterrupt
    print(config.run.dir)
    return 75


if __name__ == "__main__":
    run_verb(main)
