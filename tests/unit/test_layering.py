"""Imports go down only, without cycles; every third-party engine has one room (law L6)."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "dpo_dist"
MODULES = sorted(file.relative_to(PACKAGE) for file in PACKAGE.rglob("*.py"))
LAYERS = (
    "foundation",
    "config",
    "objective",
    "batching",
    "data",
    "model",
    "distributed",
    "reference",
    "generation",
    "insight",
    "training",
)
ROOMS = {
    "accelerate": ("distributed/", "insight/metrics/trackers"),
    "deepspeed": ("distributed/",),
    "wandb": ("insight/metrics/wandb",),
}
VERB_ENGINES = ("hydra", "omegaconf")
OUTSIDE = ("benchmarks", "examples", "scripts", "tests")


def imported(source: str, module: Path) -> Iterator[str]:
    """Yield the dotted names that a module imports anywhere, inside functions too."""
    yield from _names(ast.walk(ast.parse(source)), module)


def imported_at_once(source: str, module: Path) -> Iterator[str]:
    """Yield the dotted names that a module imports when it is imported itself."""
    yield from _names(_run_at_import(ast.parse(source)), module)


def _run_at_import(node: ast.AST) -> Iterator[ast.AST]:
    """Yield the nodes outside functions and `if TYPE_CHECKING`."""
    for child in ast.iter_child_nodes(node):
        is_typing = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
        if not is_typing and not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield child
            yield from _run_at_import(child)


def _names(nodes: Iterator[ast.AST], module: Path) -> Iterator[str]:
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def layer_of(name: str) -> int:
    """Return the layer of a room, the largest number for verbs (files at the top)."""
    return LAYERS.index(name) if name in LAYERS else len(LAYERS)


def faults(module: Path, source: str) -> list[str]:
    room = module.parts[0].removesuffix(".py")
    found = []
    for name in imported(source, module):
        root, *below = name.split(".")
        if root == "dpo_dist" and below and layer_of(below[0]) > layer_of(room):
            found.append(f"{module} imports {name} from above")
        if root in OUTSIDE:
            found.append(f"{module} imports {name}, which is not part of the package")
        if root in ROOMS and not str(module).startswith(ROOMS[root]):
            found.append(f"{module} imports {root}")
        if root in VERB_ENGINES and room != "config" and layer_of(room) != len(LAYERS):
            found.append(f"{module} imports {root}")
        if room == "config" and root == "torch":
            found.append(f"{module} imports torch")
        if room == "objective" and name.startswith("torch.distributed"):
            found.append(f"{module} communicates")
    return found


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_module_keeps_to_its_room(module: Path) -> None:
    assert faults(module, (PACKAGE / module).read_text()) == []


def test_every_folder_is_a_layer() -> None:
    folders = {module.parts[0] for module in MODULES if len(module.parts) > 1}
    assert folders <= set(LAYERS)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("objective/losses.py", "from dpo_dist.batching.pack import pack"),
        ("foundation/errors.py", "import dpo_dist.config.schema"),
        ("config/load.py", "from dpo_dist import train"),
        ("config/load.py", "def f():\n    import torch"),
        ("training/loop.py", "import deepspeed.ops"),
        ("model/load.py", "from accelerate import Accelerator"),
        ("insight/pages/run.py", "import wandb"),
        ("data/encode.py", "from omegaconf import OmegaConf"),
        ("objective/metrics.py", "from torch import distributed"),
        ("training/loop.py", "from benchmarks.setting import SHAPES"),
        ("foundation/process.py", "from dpo_dist.data import dataset"),
    ],
)
def test_a_forbidden_import_is_found(module: str, source: str) -> None:
    assert faults(Path(module), source)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("train.py", "from omegaconf import DictConfig\nfrom dpo_dist.training.loop import train"),
        ("distributed/zero.py", "import deepspeed\nfrom dpo_dist.foundation.errors import ConfigError"),
        ("insight/metrics/wandb.py", "import wandb"),
    ],
)
def test_an_allowed_import_is_not(module: str, source: str) -> None:
    assert faults(Path(module), source) == []


def cycle(sources: Mapping[str, str]) -> list[str]:
    """Return modules that import each other in a circle when they are imported; none: an empty list.

    Args:
        sources: source texts by dotted name of the module.
    """
    graph = {}
    for name, source in sources.items():
        edges = set()
        for target in imported_at_once(source, Path(name)):
            # `from dpo_dist.data import dataset` imports the module `dataset`, if there is one of this name.
            found = target if target in sources else target.rpartition(".")[0]
            if found in sources and found != name:
                edges.add(found)
        graph[name] = edges
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


@pytest.mark.parametrize("verb", ["compare", "doctor", "evaluate", "export", "pairs", "precompute", "train"])
def test_a_verb_checks_paths_before_torch_is_imported(verb: str) -> None:
    """Torch takes seconds to import: a wrong path is an error at once."""
    seen, to_read = set(), [f"dpo_dist.{verb}"]
    while to_read:
        file = PACKAGE.parent / f"{to_read.pop().replace('.', '/')}.py"
        if file.is_file() and file not in seen:
            seen.add(file)
            names = list(imported_at_once(file.read_text(), file))
            assert not [name for name in names if name.split(".")[0] in ("torch", "transformers")], file
            to_read += [*names, *(name.rpartition(".")[0] for name in names)]
    assert len(seen) > 20


def test_no_modules_import_each_other_in_a_circle() -> None:
    names = {
        module: ".".join(("dpo_dist", *module.with_suffix("").parts)).removesuffix(".__init__")
        for module in MODULES
    }
    assert cycle({name: (PACKAGE / module).read_text() for module, name in names.items()}) == []


@pytest.mark.parametrize(
    ("second", "is_cycle"),
    [
        ("from dpo_dist.data.first import x", True),
        ("from dpo_dist.data import first", True),
        ("class C:\n    import dpo_dist.data.first", True),
        ("def f():\n    from dpo_dist.data.first import x", False),
        ("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from dpo_dist.data import first", False),
    ],
)
def test_a_cycle_is_found(second: str, is_cycle: bool) -> None:
    sources = {
        "dpo_dist.data.first": "from dpo_dist.data.second import y",
        "dpo_dist.data.second": second,
        "dpo_dist.data.third": "import dpo_dist.data.first",
    }
    assert bool(cycle(sources)) is is_cycle


def test_every_imported_package_is_declared() -> None:
    project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    declared = {re.split(r"[^\w-]", entry)[0].lower() for group in groups for entry in group}
    known = packages_distributions()
    for module in MODULES:
        for node in ast.walk(ast.parse((PACKAGE / module).read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [str(node.module)]
            for name in {name.partition(".")[0] for name in names} - {*sys.stdlib_module_names, "dpo_dist"}:
                found = {distribution.lower().replace("_", "-") for distribution in known.get(name, [])}
                assert not found or found & declared, f"{module} imports {name}"
