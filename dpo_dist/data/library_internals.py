"""Undocumented parts of transformers that reading texts and images needs; those of models: `model`'s file.

tests/unit/data/test_library_internals.py calls the functions below on the real library, and fails if a new
version changes one of these parts. Imports are inside of functions: a start checks its files before torch is
imported.
"""

import copy
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend


def with_backend(tokenizer: Any, described: str) -> Any:
    """Return a copy of a fast tokenizer that encodes as the tokenizer.json in `described`.

    A tokenizer of the same class made from it would not be a copy: classes add steps of their own.
    """
    changed = copy.deepcopy(tokenizer)
    changed._tokenizer = Backend.from_str(described)
    return changed


def processor_class(folder: Path, model_type: str) -> Any:
    """Return the class that `AutoProcessor` would choose for a model folder; None if there is none."""
    from transformers.models.auto.processing_auto import (  # noqa: PLC0415
        PROCESSOR_MAPPING_NAMES,
        processor_class_from_name,
    )

    name = PROCESSOR_MAPPING_NAMES.get(model_type)
    for file in ("tokenizer_config.json", "preprocessor_config.json", "processor_config.json"):
        if (folder / file).exists():
            name = json.loads((folder / file).read_bytes()).get("processor_class") or name
    if name != "PixtralProcessor":
        return name and processor_class_from_name(name)
    from transformers.models.pixtral import image_processing_pil_pixtral  # noqa: PLC0415

    # Its module imports a function from a module that needs torchvision; the module for Pillow has it, too.
    needed = image_processing_pil_pixtral.__name__.replace("_pil_", "_")
    chosen = sys.modules.setdefault(needed, image_processing_pil_pixtral)
    try:
        from transformers.models.pixtral.processing_pixtral import PixtralProcessor  # noqa: PLC0415
    finally:
        if chosen is image_processing_pil_pixtral:
            del sys.modules[needed]
    return PixtralProcessor


def make_processor(folder: Path, kind: Any, parts: Mapping[str, Any]) -> Any:
    """Return a processor of a model folder with these parts, and without the others of its class.

    `from_pretrained` would need torchvision, and for some classes a video processor, which only it has.
    """
    accept = {"check_argument_for_proper_class": lambda *_arguments: object}
    without_check: Any = type(kind.__name__, (kind,), accept)
    parameters, _ = without_check.get_processor_dict(folder)
    arguments = list(map(parts.get, without_check.get_attributes()))
    return without_check.from_args_and_dict(arguments, parameters)
