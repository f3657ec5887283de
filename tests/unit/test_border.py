"""The border: what `data` takes from the rest of the package, and what the rest takes from it."""

import ast
import subprocess
import sys
from collections.abc import Iterator

import pytest

import dpo_dist.data
from tests.unit.test_layering import PACKAGE, modules

pytestmark = pytest.mark.slow

FACE = "dpo_dist.data"
TRAINER = """
    DataConfig ScoredDataConfig Source SourceConfig UnpairedDataConfig
    DataSource Part full_name read_records source_labels write_records
    BadRecord ImageFile NUMBERS Origin PreferenceRecord RawRecord Record SCORERS UnusableRecordError
    prompt_hash
    ChatTemplate EncodedExample EncodedRecord ExpandedImage ImageProcessor encode_record final_tokens
    trained_stops Example ImageInput Mask TokenIds
    DataCounts Outcome describe_counts named_in_one_line
"""
"""Names that the trainer takes, all of the face: a new one is a decision."""
MODULES_FOR_TOOLS = {
    "config": "TEMPLATE_DATE",
    "counts": "count_lines reason_remedy",
    "encode": "encode_pair",
    "images": "decode_image",
    "read.files": "store_image",
    "read.plain": "parse_json",
    "records": "parts_of",
    "text.escape": "THOUGHT_FIELDS any_of",
    "text.tokenizer": "TokenizerFacts tokenizer_facts",
}
"""What tools take from modules of the border: each name has one or two users."""
GUESTS = ("dpo_dist.trl.", "dpo_dist.tools.", "dpo_dist.compat.")
SLOW = {"torch", "torch.distributed", "accelerate", "deepspeed", "hydra", "transformers"}


def taken(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """Yield the names that a module imports from this package, each after the module that it names."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("dpo_dist"):
            yield from ((str(node.module), alias.name) for alias in node.names)


def taken_from_data(*, by_guests: bool) -> set[tuple[str, str]]:
    """Return what the modules outside of `data` take from it: those of tools and guests, or the trainer's."""
    names = set[tuple[str, str]]()
    for module, tree in modules().items():
        if not module.startswith(FACE) and module.startswith(GUESTS) == by_guests:
            names |= {(home, name) for home, name in taken(tree) if home.startswith(FACE)}
    return names


def test_data_take_from_the_base_only_and_not_from_their_face() -> None:
    for module, tree in modules().items():
        if module.startswith(f"{FACE}."):
            homes = {f"{home}." for home, _ in taken(tree)}
            assert all(home.startswith((f"{FACE}.", "dpo_dist.foundation.")) for home in homes), module
            assert f"{FACE}." not in homes, module


def test_the_trainer_takes_these_names_from_the_face() -> None:
    assert taken_from_data(by_guests=False) == {(FACE, name) for name in TRAINER.split()}


def test_tools_take_these_names() -> None:
    """A tool is free to take what the face has."""
    expected = set[tuple[str, str]]()
    for module, names in MODULES_FOR_TOOLS.items():
        expected |= {(f"{FACE}.{module}", name) for name in names.split()}
    assert {(home, name) for home, name in taken_from_data(by_guests=True) if home != FACE} == expected


def test_the_face_has_each_of_its_names_from_the_module_that_defines_it() -> None:
    tree = ast.parse((PACKAGE / "data" / "__init__.py").read_text())
    imports = {name: home for home, name in taken(tree) if home.startswith(f"{FACE}.")}
    assert sorted(imports) == sorted(dpo_dist.data.__all__)
    assert set(TRAINER.split()) <= set(imports)
    for name, home in imports.items():
        assert getattr(dpo_dist.data, name) is getattr(sys.modules[home], name)
        assert f"`{name}`" in str(dpo_dist.data.__doc__), name
    with pytest.raises(AttributeError, match="has no attribute 'import_records'"):
        _ = dpo_dist.data.import_records


def test_a_program_that_reads_and_encodes_loads_no_trainer() -> None:
    """With all names of the face: images need transformers, which is imported when one is read."""
    program = "import sys, dpo_dist.data as data; [getattr(data, name) for name in data.__all__]"
    own = "(name for name in sys.modules if name.startswith('dpo_dist'))"
    program = f"{program}; print(*{SLOW} & {{*sys.modules}}, *{own})"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    rooms = {".".join(name.split(".")[:2]) for name in run.stdout.split()}
    assert rooms == {"dpo_dist", "dpo_dist.data", "dpo_dist.foundation"}
