"""A launcher of two warm processes, in place of `dpo-dist launch`, whose own import for eight seconds each.

`python -m tests.support.warm_launcher ADDRESS CONFIG -m dpo_dist VERB ...`: the address of the warm parent,
the file of the launcher's settings, and what a launcher is given.
"""

import os
import sys
from pathlib import Path

from tests.support.parent import use_parent
from tests.support.warm import launcher_variables, start_verb, wait


def main(address: str, config: str, flag: str, package: str, verb: str, *words: str) -> int:
    """Return the exit code of the verb on two processes, which write to this one's standard output."""
    assert (flag, package) == ("-m", "dpo_dist")
    use_parent(address)
    variables = {**os.environ, **launcher_variables(Path(config))}
    screen = Path(f"/proc/{os.getpid()}/fd/1")
    return wait(start_verb(verb, list(words), variables, 2, Path.cwd(), screen), 300)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
