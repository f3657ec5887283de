"""Imports go down only, and every third-party engine has one room (law L6)."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "dpo_dist"
MODULES = sorted(file.relative_to(PACKAGE) for file in PACKAGE.rglob("*.py"))
FOUNDATION = ("errors", "atomic", "digests", "prefetch")
LAYERS = (
    "config",
    "objective",
    "data",
    "model",
    "distributed",
    "reference",
    "report",
    "training",
)
ROOMS = {
    "accelerate": ("distributed/",),
    "deepspeed": ("distributed/",),
    "wandb": ("report/tracking.py",),
}
VERB_ENGINES = ("hydra", "omegaconf")


def imported(source: str, module: Path) -> Iterator[str]:
    """The dotted names that a module imports anywhere, inside functions too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def height(name: str) -> int:
    """How high a room stands: errors, atomic and digests lowest, the verbs (files at the top) highest."""
    if name in FOUNDATION:
        return -1
    return LAYERS.index(name) if name in LAYERS else len(LAYERS)


def faults(module: Path, source: str) -> list[str]:
    room = module.parts[0].removesuffix(".py")
    found = []
    for name in imported(source, module):
        root, *below = name.split(".")
        if root == "dpo_dist" and below and height(below[0]) > height(room):
            found.append(f"{module} imports {name} from above")
        if root in ROOMS and not str(module).startswith(ROOMS[root]):
            found.append(f"{module} imports {root}")
        if root in VERB_ENGINES and 0 != height(room) != len(LAYERS):
            found.append(f"{module} imports {root}")
        if room == "config" and root == "torch":
            found.append(f"{module} imports torch")
        if room == "objective" and name.startswith("torch.distributed"):
            found.append(f"{module} communicates")
    return found


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_module_keeps_to_its_room(module: Path) -> None:
    assert faults(module, (PACKAGE / module).read_text()) == []


def test_every_folder_has_a_place() -> None:
    folders = {module.parts[0] for module in MODULES if len(module.parts) > 1}
    assert folders <= set(LAYERS)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("objective/losses.py", "from dpo_dist.data.packing import pack"),
        ("errors.py", "import dpo_dist.config.schema"),
        ("config/load.py", "from dpo_dist import train"),
        ("config/load.py", "def f():\n    import torch"),
        ("training/loop.py", "import deepspeed.ops"),
        ("model/load.py", "from accelerate import Accelerator"),
        ("report/page.py", "import wandb"),
        ("data/encode.py", "from omegaconf import OmegaConf"),
        ("objective/metrics.py", "from torch import distributed"),
    ],
)
def test_a_forbidden_import_is_found(module: str, source: str) -> None:
    assert faults(Path(module), source)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("train.py", "from omegaconf import DictConfig\nfrom dpo_dist.training.loop import train"),
        ("distributed/engine.py", "import deepspeed\nfrom dpo_dist.errors import ConfigError"),
        ("report/tracking.py", "import wandb"),
    ],
)
def test_an_allowed_import_is_not(module: str, source: str) -> None:
    assert faults(Path(module), source) == []
