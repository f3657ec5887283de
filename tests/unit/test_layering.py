"""Imports go down only, without cycles; every third-party engine has one room (law L6)."""

import ast
import functools
import itertools
import re
import subprocess
import sys
import threading
import tomllib
from collections import defaultdict
from collections.abc import Iterator
from graphlib import TopologicalSorter
from importlib.metadata import packages_distributions
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import nn

from dpo_dist.config.verbs import VERBS

pytestmark = pytest.mark.slow

PACKAGE = Path(__file__).parents[2] / "dpo_dist"


@functools.cache
def modules() -> dict[str, ast.Module]:
    """Return the code of each module."""
    files = (file for file in sorted(PACKAGE.rglob("*.py")) if file.name != "__init__.py")
    names = {".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts): file for file in files}
    return {name: ast.parse(file.read_text()) for name, file in names.items()}


LAYERS = (
    *("foundation", "data", "config", "objective", "batching", "encoded", "model", "distributed"),
    *("reference", "training", "kit", "tools", "compat", "verbs"),
)
ROOMS = {
    "accelerate": r"distributed\.|training\.reporting\.trackers",
    "deepspeed": r"distributed\.",
    "wandb": r"training\.reporting\.wandb_run",
    "hydra": r"config\.|tools\.sweep\.points",
    "omegaconf": r"config\.",
    "torch": r"(?!config\.|foundation\.)",
    "torch.distributed": r"(?!objective\.)",
    **dict.fromkeys(("benchmarks", "examples", "scripts", "tests"), r"\b\B"),
}
"""By package: the modules that may import it."""


@functools.cache
def homes_of_faces() -> dict[str, str]:
    """Return the names of the data's face and of the kit, each with its name in its own module."""
    homes = dict[str, str]()
    for face, file in (("dpo_dist.data", "data/__init__.py"), ("dpo_dist.kit", "kit.py")):
        for node in ast.walk(ast.parse((PACKAGE / file).read_text())):
            if isinstance(node, ast.ImportFrom):
                homes |= {f"{face}.{alias.name}": f"{node.module}.{alias.name}" for alias in node.names}
    return homes


def imported(nodes: Iterator[ast.AST]) -> Iterator[str]:
    """Yield the dotted names that nodes import; those of a face as its modules have them."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names = (f"{node.module}.{alias.name}" for alias in node.names)
            yield from (homes_of_faces().get(name, name) for name in names)


def run_at_import(node: ast.AST, *, for_types: bool = False) -> Iterator[ast.AST]:
    """Yield the nodes outside functions, and those of `if TYPE_CHECKING` only `for_types`."""
    for child in ast.iter_child_nodes(node):
        is_typing = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
        is_function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        if not is_function and (for_types or not is_typing):
            yield child
            yield from run_at_import(child, for_types=for_types)


def layer_of(name: str) -> int:
    """Return the layer of a module's room; files at the top are verbs."""
    room = name.split(".")[1]
    return LAYERS.index(room if room in LAYERS else "verbs")


def test_imports_go_down_and_engines_stay_in_their_rooms() -> None:
    for module, tree in modules().items():
        for name in imported(ast.walk(tree)):
            if name.startswith("dpo_dist."):
                assert layer_of(name) <= layer_of(module), f"{module} imports {name} from above"
            for package, rooms in ROOMS.items():
                if f"{name}.".startswith(f"{package}."):
                    assert re.match(rooms, module.removeprefix("dpo_dist.")), f"{module} imports {name}"


WALLED = ("accelerate", "deepspeed", "liger_kernel", "peft", "transformers")
"""Packages whose undocumented parts are used in `WALLS` only."""
WALLS = (
    "dpo_dist.data.library_internals",
    "dpo_dist.distributed.deepspeed_internals",
    "dpo_dist.model.library_internals",
)
DOCUMENTED = re.compile(
    r"transformers(\.(image_processing_backends|masking_utils|modeling_layers|pytorch_utils|trainer_callback"
    r"|trainer_pt_utils|trainer_utils|utils))?"
)
"""The modules of transformers that its documentation has a page of."""
BY_NAME = ("delattr", "getattr", "hasattr", "setattr")


def defined_in(tree: ast.AST) -> Iterator[str]:
    """Yield the names of functions, classes, fields and attributes of `self` that a module defines."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        if isinstance(node, ast.ClassDef):
            for entry in node.body:
                targets = entry.targets if isinstance(entry, ast.Assign) else [getattr(entry, "target", None)]
                yield from (target.id for target in targets if isinstance(target, ast.Name))
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield from [node.attr] * (root_of(node) in ("self", "cls"))


@functools.cache
def known_attributes() -> set[str]:
    """Return the names of attributes that this package, Python or PyTorch defines."""
    weight = nn.Parameter(torch.ones(1))
    values = [
        weight,
        weight.untyped_storage(),
        nn.Linear(1, 1),
        torch.optim.AdamW([weight]),
        torch,
        torch.cuda,
    ]
    values += [torch.distributed, NamedTuple("Pair", [("first", int)])(1), Path(), threading.Lock()]
    values += [threading.Event(), "", {}, []]
    own = itertools.chain.from_iterable(map(defined_in, modules().values()))
    return {name for value in values for name in dir(value)} | set(own)


@functools.cache
def parts_of_engines() -> set[str]:
    """Return the names that DeepSpeed sets on engines, optimizers and weights, or defines but for engines."""
    spec = find_spec("deepspeed")
    assert spec is not None
    assert spec.origin is not None
    parts, of_engine = set[str](), set[str]()
    for file in (Path(spec.origin).parent / "runtime").rglob("*.py"):
        tree = ast.parse(file.read_text())
        defined = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
        (of_engine if file.name == "engine.py" else parts).update(defined)
        nodes = (node for node in ast.walk(tree) if isinstance(node, ast.Attribute))
        parts |= {node.attr for node in nodes if isinstance(node.ctx, ast.Store)}
    return parts - of_engine


def root_of(node: ast.expr) -> str:
    """Return the name with which a chain of attributes begins; empty: it begins with another expression."""
    while isinstance(node, ast.Attribute):
        node = node.value
    return node.id if isinstance(node, ast.Name) else ""


def attributes(tree: ast.AST) -> Iterator[tuple[ast.expr, str, bool]]:
    """Yield each attribute that a module uses, also by a string: of what, its name, whether it is set."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield node.value, node.attr, not isinstance(node.ctx, ast.Load)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in BY_NAME:
            owner, name, *_ = node.args
            if isinstance(name, ast.Constant):
                yield owner, str(name.value), ast.unparse(node.func) in ("delattr", "setattr")


def undocumented(tree: ast.AST, *, has_engines: bool) -> set[str]:
    """Return the names that a module uses of `WALLED`, or may use, that these packages do not document.

    These are names with an underscore before them, modules of transformers that are not `DOCUMENTED`, `ds_`
    attributes of weights, DeepSpeed's `runtime`, what is set on an imported object, and in a module that
    `has_engines`, the parts of engines.
    """
    package_of: dict[str, str] = {}  # by the name in the module
    found = set[str]()
    for node in ast.walk(tree):
        for alias in node.names if isinstance(node, ast.Import | ast.ImportFrom) else ():
            path = f"{node.module}.{alias.name}" if isinstance(node, ast.ImportFrom) else alias.name
            package, *parts = path.split(".")
            package_of[alias.asname or alias.name.partition(".")[0]] = package
            if package in WALLED and (parts[:1] == ["runtime"] or any(part[0] == "_" for part in parts)):
                found.add(path)
            module = path.rpartition(".")[0] if isinstance(node, ast.ImportFrom) else path
            if package == "transformers" and not DOCUMENTED.fullmatch(module):
                found.add(path)
    for owner, name, is_set in attributes(tree):
        package = package_of.get(root_of(owner))
        if package in WALLED and (is_set or (name.startswith("_") and name not in dir(torch))):
            found.add(name)
        elif package is None and not name.startswith("__") and name not in known_attributes():
            is_private = name.startswith(("_", "ds_"))
            found |= {name} if is_private or (has_engines and name in parts_of_engines()) else set()
    return found


def test_undocumented_parts_of_libraries_are_used_in_their_files() -> None:
    for module, tree in modules().items():
        if module not in WALLS:
            assert not undocumented(tree, has_engines=module.startswith("dpo_dist.distributed.")), module


UNDOCUMENTED_USES = {
    **{f"x.{name}": name for name in ("_hp_mapping", "ds_shape", "ds_status", "ds_opt_adam", "linear_bk")},
    **{f"x.y.{name}()": name for name in ("averaged_gradients", "param_coordinator", "parameter_offload")},
    **{f"x().{name} = 1": name for name in ("fp32_partitioned_groups_flat", "enable_backward_allreduce")},
    **{f"hasattr(x, '{name}')": name for name in ("ds_tensor", "nvme_swapper", "update_lp_params")},
    "engine.optimizer.param_groups": "optimizer",
    "import deepspeed\ndeepspeed.ops.__compatible_ops__['x'] = 1": "__compatible_ops__",
    "import deepspeed\ndeepspeed.comm.comm.cdb = None": "cdb",
    "from deepspeed.runtime.engine import X": "deepspeed.runtime.engine.X",
    "from transformers import utils as y\ny._z()": "_z",
    "from transformers.utils import _z": "transformers.utils._z",
    "from transformers.conversion_mapping import y": "transformers.conversion_mapping.y",
    "import transformers.integrations.deepspeed": "transformers.integrations.deepspeed",
    "from peft._z import y": "peft._z.y",
    "import liger_kernel._z": "liger_kernel._z",
    "from accelerate.state import AcceleratorState\nAcceleratorState._reset_state()": "_reset_state",
}


@pytest.mark.parametrize("code", UNDOCUMENTED_USES)
def test_a_use_of_an_undocumented_part_is_found(code: str) -> None:
    assert undocumented(ast.parse(code), has_engines=True) == {UNDOCUMENTED_USES[code]}


@pytest.mark.parametrize("wall", WALLS)
def test_tests_call_each_function_of_a_wall(wall: str) -> None:
    """A version that changes the part behind a function fails its test."""
    tests = [file.read_text() for file in (PACKAGE.parent / "tests/unit").rglob("test_*_internals.py")]
    called = {name.id for text in tests for name in ast.walk(ast.parse(text)) if isinstance(name, ast.Name)}
    functions = {node.name for node in modules()[wall].body if isinstance(node, ast.FunctionDef)}
    assert {name for name in functions if not name.startswith("_")} <= called


FOLDERS_OF_TOOLS = "|".join(file.parent.name for file in (PACKAGE / "tools").glob("*/__main__.py"))
TOOLS = re.compile(rf"dpo_dist\.tools\.({FOLDERS_OF_TOOLS})\.")
"""Matches the modules of a tool; the other ones of `tools` are what several tools use."""


def test_what_several_tools_use_knows_no_tool() -> None:
    others = [name for name in modules() if name.startswith("dpo_dist.tools.") and not TOOLS.match(name)]
    for module in others:
        assert not [name for name in imported(ast.walk(modules()[module])) if TOOLS.match(name)], module
    assert len(others) > 10


def modules_imported_by(module: str, *, for_types: bool = False) -> set[str]:
    """Return those of this package that a module imports when it is imported itself, or for its types."""
    # `from dpo_dist.data import dataset` imports the module `dataset`, if there is one of this name.
    names = set(imported(run_at_import(modules()[module], for_types=for_types)))
    return (names | {name.rpartition(".")[0] for name in names}) & modules().keys() - {module}


def test_no_modules_import_each_other_in_a_circle() -> None:
    """Nor know each other's types: what only a type checker imports is read beside the rest."""
    TopologicalSorter({module: modules_imported_by(module, for_types=True) for module in modules()}).prepare()


BY_CONVENTION = {"log", "T"}
"""Names of a module's log and of a type variable, which no other module imports."""
OF_EXTENSIONS = {"EXTENSION", "rules_of_verb"}
"""What `config.extensions` looks for in the rooms above the trainer."""
VERB_FUNCTIONS = {"main", "check"}
"""What each verb does, and what its `--check` yields."""
API_FUNCTIONS = {"load_tokenizer", "token_logps", "train"}
"""Users call these by `dpo_dist.api`, a contract; each does what its namesake does, with fewer arguments."""


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
    verbs = {verb.module for verb in VERBS.values()}
    homes = defaultdict[str, set[str]](set)
    for module, tree in modules().items():
        is_verb = module.removesuffix(".__main__") in verbs or module == "dpo_dist.__main__"
        allowed = (BY_CONVENTION | OF_EXTENSIONS) | (
            VERB_FUNCTIONS if is_verb else API_FUNCTIONS if module == "dpo_dist.api" else set()
        )
        for name in set(public_names(tree)) - allowed:
            homes[name].add(module)
    assert {name: modules for name, modules in homes.items() if len(modules) > 1} == {}
    assert not homes.keys() & VERB_FUNCTIONS, "only verbs have these"
    assert homes.keys() >= API_FUNCTIONS


def test_a_name_that_modules_share_by_convention_is_not_imported() -> None:
    names = {name for tree in modules().values() for name in imported(ast.walk(tree))}
    assert [name for name in names if re.fullmatch(rf"dpo_dist\..*\.({'|'.join(BY_CONVENTION)})", name)] == []


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_imports_torch_after_its_arguments_are_checked(verb: str) -> None:
    """Torch takes seconds to import: a help text and a wrong path are there at once."""
    program = VERBS[verb].module
    seen, to_read = set(), {program if program in modules() else f"{program}.__main__"}
    while to_read:
        seen.add(module := to_read.pop())
        packages = {name.partition(".")[0] for name in imported(run_at_import(modules()[module]))}
        assert not packages & {"torch", "transformers", "peft"}, module
        to_read |= modules_imported_by(module) - seen
    assert "dpo_dist.foundation.errors" in seen


def test_a_dry_run_imports_no_deepspeed() -> None:
    """DeepSpeed takes a second to import, and `--check` starts no process."""
    seen, to_read = set(), {"dpo_dist.training.start.dry_run", "dpo_dist.tools.plan.make_plan"}
    while to_read:
        seen.add(module := to_read.pop())
        names = imported(run_at_import(modules()[module]))
        assert "deepspeed" not in {name.partition(".")[0] for name in names}, module
        to_read |= modules_imported_by(module) - seen
    assert "dpo_dist.training.start.footprint" in seen


def test_a_model_without_adapter_needs_no_peft() -> None:
    """peft imports bitsandbytes, which takes as long as torch."""
    parts = ("training.run", "training.start.dry_run", "tools.plan.make_plan")
    program = (
        f"import sys, {', '.join(f'dpo_dist.{part}' for part in parts)}\nsys.exit('peft' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_every_imported_package_is_declared() -> None:
    project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    declared = {re.split(r"[^\w-]", entry)[0].lower() for group in groups for entry in group}
    known = packages_distributions()
    for module, tree in modules().items():
        for name in {name.partition(".")[0] for name in imported(ast.walk(tree))} - sys.stdlib_module_names:
            found = {distribution.lower().replace("_", "-") for distribution in known.get(name, [])}
            assert name == "dpo_dist" or not found or found & declared, f"{module} imports {name}"
