"""A bad input with the error that it gets; run as a person would type it, in a folder of its own."""

import re
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from dpo_dist.config.verbs import VERBS
from dpo_dist.foundation.files import is_temporary
from tests.support.launch import environment
from tests.support.warm import ENVIRONMENT, reserve_port, run_warm_apart

RUN = "model.path=model model.dtype=fp32 data.train=[train.jsonl] tracking=off trainer.global_batch_pairs=6"
"""A run that trains; a case adds its mistake."""

_SECONDS = 900
_CACHES = ("output", "output/encoded(/.*)?", "output/reference(/.*)?")
"""Complete files that are addressed by content: encoded data and digests of files."""
_LABELS = ("where", "got", "expected", "to do")
_TITLE = re.compile(
    r"^(?:configuration error|data error|reference error|checkpoint error|process lost|error): ", re.M
)


@dataclass(frozen=True)
class Case:
    """A mistake, and the essential words of each line of its error.

    Attributes:
        name: of the test.
        typed: the command line after `run`, as in a shell; FOLDER is the working folder.
        what: in the first line of the block.
        where: in its line; so are `got`, `expected` and `to_do`. An empty one is not looked for.
        before: makes files in the working folder, which has `model`, `train.jsonl` and `eval.jsonl`.
        verb: module below dpo_dist.
        run: arguments before `typed`.
        code: exit code.
        joins: whether it is found after the processes have joined. Otherwise the command runs as rank 0 of 2
            without a rank 1, for which it would wait.
        place: variables in place of those of rank 0 of 2.
        leaves: regular expressions of paths that may be there afterwards; with `joins` also complete files
            that are addressed by content.
    """

    name: str
    typed: str
    what: str
    where: str = ""
    got: str = ""
    expected: str = ""
    to_do: str = ""
    before: Callable[[Path], object] | None = None
    verb: str = "train"
    run: str = RUN
    code: int = 2
    joins: bool = False
    place: Mapping[str, str] | None = None
    leaves: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.name


def check_case(case: Case, folder: Path, assets: Path) -> None:
    """Run the command of a case in `folder`, which is empty: code, the one block, and nothing is written."""
    for name in ("model", "train.jsonl", "eval.jsonl"):
        (folder / name).symlink_to(assets / name)
    if case.before is not None:
        case.before(folder)
    before = _content(folder)
    arguments = shlex.split(f"{case.run} {case.typed}".replace("FOLDER", str(folder)))
    variables = {**environment(), **ENVIRONMENT, **_place(case)}
    module = VERBS[case.verb].module
    code, output, errors = run_warm_apart(module, arguments, variables, folder, _SECONDS)
    shown = f"{case.typed}\nexit code {code}\n{output}\n--- stderr\n{errors}"
    assert code == case.code, shown
    assert "Traceback" not in errors + output, shown
    assert len(_TITLE.findall(errors)) == 1, shown
    assert not _TITLE.search(output), shown
    lines = _lines(errors)
    assert case.what in lines["what"], shown
    wanted = {"where": case.where, "got": case.got, "expected": case.expected, "to do": case.to_do}
    for label, text in wanted.items():
        assert text in lines.get(label, ""), f"{label}: {text!r} is not in\n{shown}"
    assert lines.get("to do"), f"no remedy\n{shown}"
    after = _content(folder)
    allowed = "|".join((*case.leaves, *(_CACHES if case.joins else ())))
    left = after.keys() - before.keys()
    assert [one for one in left if is_temporary(Path(one)) or not re.fullmatch(allowed, one)] == [], shown
    assert [name for name, content in before.items() if after.get(name) != content] == [], shown


def _place(case: Case) -> Mapping[str, str]:
    """Return the variables of rank 0 of 2 without a rank 1; nothing for one process."""
    if case.place is not None:
        return case.place
    if case.joins or case.verb == "doctor":  # which is one process
        return {}
    world = {"RANK": 0, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 2}
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(reserve_port())}
    return {name: str(number) for name, number in world.items()} | address


def _content(folder: Path) -> dict[str, bytes]:
    """Return the content of every file below a folder; links are not followed."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() and not path.is_symlink() else b""
        for path in folder.rglob("*")
    }


def _lines(errors: str) -> dict[str, str]:
    """Return the lines of the block by label; the first is `what`. The block ends the output."""
    start = _TITLE.search(errors)
    assert start is not None
    first, *others = errors[start.start() :].rstrip("\n").split("\n")
    found = {"what": first}
    for line in others:
        if line.startswith("    "):  # goes on with the line before
            continue
        label, _, text = line.strip().partition(":")
        assert label in _LABELS, f"a line after the block: {line!r}"
        assert label not in found, f"two lines of {label}"
        found[label] = text.strip()
    return found
