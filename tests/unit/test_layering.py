"""Imports go down only, without cycles; every third-party engine has one room (law L6)."""

import ast
import itertools
import re
import sys
import tomllib
from collections import defaultdict
from collections.abc import Iterator
from graphlib import TopologicalSorter
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from dpo_dist.config.verbs import VERBS

PACKAGE = Path(__file__).parents[2] / "dpo_dist"
MODULES = {
    ".".join(("dpo_dist", *file.relative_to(PACKAGE).with_suffix("").parts)): ast.parse(file.read_text())
    for file in sorted(PACKAGE.rglob("*.py"))
    if file.name != "__init__.py"
}
LAYERS = (
    *("foundation", "config", "objective", "batching", "data", "model", "distributed", "reference"),
    *("training", "verbs", "tools"),
)
ROOMS = {
    "accelerate": r"distributed\.|training\.trackers",
    "deepspeed": r"distributed\.",
    "wandb": r"training\.trackers",
    "hydra": r"config\.|\w+$",  # verbs, too
    "omegaconf": r"config\.|\w+$",
    "torch": r"(?!config\.|foundation\.)",
    "torch.distributed": r"(?!objective\.)",
    **dict.fromkeys(("benchmarks", "examples", "scripts", "tests"), r"\b\B"),
}
"""By package: the modules that may import it."""


def imported(nodes: Iterator[ast.AST]) -> Iterator[str]:
    """Yield the dotted names that nodes import."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def run_at_import(node: ast.AST) -> Iterator[ast.AST]:
    """Yield the nodes outside functions and `if TYPE_CHECKING`."""
    for child in ast.iter_child_nodes(node):
        is_typing = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
        if not is_typing and not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield child
            yield from run_at_import(child)


def layer_of(name: str) -> int:
    """Return the layer of a module's room; files at the top are verbs."""
    room = name.split(".")[1]
    return LAYERS.index(room if room in LAYERS else "verbs")


def is_verb(module: str) -> bool:
    """Return whether a module is a verb of a run, or at the top."""
    return LAYERS[layer_of(module)] == "verbs"


def test_imports_go_down_and_engines_stay_in_their_rooms() -> None:
    for module, tree in MODULES.items():
        for name in imported(ast.walk(tree)):
            if name.startswith("dpo_dist."):
                is_passed_in = is_verb(module) and name.startswith("dpo_dist.tools.")
                assert is_passed_in or layer_of(name) <= layer_of(module), (
                    f"{module} imports {name} from above"
                )
            for package, rooms in ROOMS.items():
                if f"{name}.".startswith(f"{package}."):
                    assert re.match(rooms, module.removeprefix("dpo_dist.")), f"{module} imports {name}"


def test_sampling_and_judges_know_nothing_of_the_tools_that_use_them() -> None:
    users = ("chat", "compare", "pairs")
    below = [module for module in MODULES if re.match(r"dpo_dist\.tools\.(sampling|judges)\b", module)]
    for module in below:
        for name in imported(ast.walk(MODULES[module])):
            assert not re.match(rf"dpo_dist\.tools\.({'|'.join(users)})\b", name), f"{module} imports {name}"
    assert len(below) > 3


PRIVATE_OF_DEEPSPEED = (
    *("_hp_mapping", "fp32_partitioned_groups_flat", "averaged_gradients", "param_coordinator"),
    *("nvme_swapper", "ds_status", "ds_opt_adam", "cdb", "linear_bk", "update_lp_params"),
)


def test_private_parts_of_deepspeed_are_touched_in_one_file() -> None:
    for module, tree in MODULES.items():
        touched = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        if not module.endswith(".deepspeed_internals"):
            assert touched.isdisjoint(PRIVATE_OF_DEEPSPEED), module


def modules_imported_by(module: str) -> set[str]:
    """Return those of this package that a module imports when it is imported itself."""
    # `from dpo_dist.data import dataset` imports the module `dataset`, if there is one of this name.
    names = set(imported(run_at_import(MODULES[module])))
    return (names | {name.rpartition(".")[0] for name in names}) & MODULES.keys() - {module}


def test_no_modules_import_each_other_in_a_circle() -> None:
    TopologicalSorter({module: modules_imported_by(module) for module in MODULES}).prepare()


REPEATED = {"main", "check", "log", "T"}
"""What a verb does and checks first; the usual names of a module's log and of a type variable."""
DOUBLES = {
    *(
        "BATCH_TOKENS",
        "BEST",
        "EVALUATED",
        "Facts",
        "Judgement",
        "KEY",
        "KINDS",
        "Key",
        "LOSS",
        "PART_PROMPTS",
    ),
    *("Progress", "RULES", "Recorder", "Results", "Role", "Row", "Rule", "Run", "Samples", "Say", "Source"),
    *("Speaker", "TIE", "Table", "Values", "estimate", "inert", "load_tokenizer", "number", "samples_of"),
    *("token_logps", "train"),
}
"""Names that still have several meanings; none is added."""


def public_names(tree: ast.Module) -> Iterator[str]:
    """Yield the classes, functions, constants and types that a module defines for others."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            names = [node.name]
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            nodes = itertools.chain.from_iterable(map(ast.walk, targets))
            # Not `a.b = c`, which defines no name.
            names = [n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)]
        else:
            names = []
        yield from (name for name in names if not name.startswith("_"))


def test_a_public_name_has_one_meaning() -> None:
    homes = defaultdict[str, set[str]](set)
    for module, tree in MODULES.items():
        for name in public_names(tree):
            homes[name].add(module)
    several = {name: modules for name, modules in homes.items() if len(modules) > 1}
    assert not several.keys() - REPEATED - DOUBLES, {
        name: several[name] for name in several.keys() - REPEATED - DOUBLES
    }


CHECK_FIRST = ("compare", "doctor", "evaluate", "export", "pairs", "precompute", "train")


@pytest.mark.parametrize("verb", CHECK_FIRST)
def test_a_verb_checks_paths_before_torch_is_imported(verb: str) -> None:
    """Torch takes seconds to import: a wrong path is an error at once."""
    program = VERBS[verb].module
    seen, to_read = set(), {program if program in MODULES else f"{program}.__main__"}
    while to_read:
        seen.add(module := to_read.pop())
        packages = {name.partition(".")[0] for name in imported(run_at_import(MODULES[module]))}
        assert not packages & {"torch", "transformers"}, module
        to_read |= modules_imported_by(module) - seen
    assert len(seen) > 20


def test_every_imported_package_is_declared() -> None:
    project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    declared = {re.split(r"[^\w-]", entry)[0].lower() for group in groups for entry in group}
    known = packages_distributions()
    for module, tree in MODULES.items():
        for name in {name.partition(".")[0] for name in imported(ast.walk(tree))} - sys.stdlib_module_names:
            found = {distribution.lower().replace("_", "-") for distribution in known.get(name, [])}
            assert name == "dpo_dist" or not found or found & declared, f"{module} imports {name}"
