"""The image installs pinned versions, and does not run as root."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def instructions() -> list[tuple[str, str]]:
    """Return keyword and arguments of each instruction, continued lines joined."""
    lines = [line for line in (ROOT / "Dockerfile").read_text().splitlines() if not line.startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [(line.split()[0], line.split(maxsplit=1)[1]) for line in joined.splitlines() if line.strip()]


def arguments(keyword: str) -> list[str]:
    return [rest for name, rest in instructions() if name == keyword]


def test_every_version_comes_from_constraints() -> None:
    commands = [part.strip() for run in arguments("RUN") for part in re.split(r"&&|;|\bthen\b", run)]
    installs = [command for command in commands if "pip install" in command]
    assert installs
    for command in installs:
        assert "--constraint constraints.txt" in command or command == "pip install --no-deps .", command
        assert not re.search(r"[=<>~!]=|[<>]\s*\d", command), command


def test_it_does_not_run_as_root() -> None:
    names = [name for name, _ in instructions()]
    assert arguments("USER") == ["trainer"]
    assert "RUN" not in names[names.index("USER") :]
