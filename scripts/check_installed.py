"""Check that this environment has the package and the dependencies that constraints.txt pins. Stdlib only.

Run as `check_installed.py [EXTRA ...]`; exits with 1 if a package is missing or has another version. Ignores
the local part of a version, such as +cu130 of a torch that is built for one accelerator.
"""

import json
import re
import sys
import tomllib
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main() -> int:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    requirements = list(project["dependencies"])
    for extra in sys.argv[1:]:
        requirements += project["optional-dependencies"][extra]
    pins = dict(
        line.split("==")
        for line in (ROOT / "constraints.txt").read_text().split()
        if not line.startswith("#")
    )
    installed = {_normal(found.name): found.version.split("+")[0] for found in metadata.distributions()}
    named = {_normal(re.split(r"[^\w.-]", requirement)[0]) for requirement in requirements}
    complete = named <= installed.keys()
    pinned = all(installed.get(_normal(name), version) == version for name, version in pins.items())
    return 0 if complete and pinned and _is_editable_here(project["name"]) else 1


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _is_editable_here(name: str) -> bool:
    """Return whether this checkout is installed; pip installs it last, so that dependencies are complete."""
    try:
        origin = metadata.distribution(name).read_text("direct_url.json")
    except metadata.PackageNotFoundError:
        return False
    return origin is not None and json.loads(origin)["url"] == ROOT.as_uri()


if __name__ == "__main__":
    sys.exit(main())
