"""Model folders that cannot be trained."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.e2e.catalogue.case import Case
from tests.e2e.catalogue.conftest import Check

Before = Callable[[Path], object]
BROKEN = "model.path=broken"


def changed(change: Callable[[Path], object]) -> Before:
    """Copy the model to `broken` and change it there."""

    def copy(folder: Path) -> None:
        shutil.copytree((folder / "model").resolve(), folder / "broken")
        change(folder / "broken")

    return copy


def edited(name: str, **values: Any) -> Before:
    """Change values in a JSON file of the model."""

    def edit(model: Path) -> None:
        (model / name).write_text(json.dumps(json.loads((model / name).read_text()) | values))

    return changed(edit)


def rewritten(name: str, content: str) -> Before:
    """Replace a file of the model."""
    return changed(lambda model: (model / name).write_text(content))


def with_weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Before:
    """Change the tensors of the model."""

    def rewrite(model: Path) -> None:
        tensors = load_file(model / "model.safetensors")
        change(tensors)
        save_file(tensors, model / "model.safetensors", {"format": "pt"})

    return changed(rewrite)


def indexed(index: str) -> Before:
    """Replace the weights by an index of files that are not there."""

    def change(model: Path) -> None:
        (model / "model.safetensors").unlink()
        (model / "model.safetensors.index.json").write_text(index)

    return changed(change)


def truncated(model: Path) -> None:
    """Weights of which the end is missing."""
    content = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(content[: len(content) // 2])


def run_directory(folder: Path) -> None:
    """A folder with a model in a folder below."""
    shutil.copytree((folder / "model").resolve(), folder / "broken/model")


def without_end_of_text(folder: Path) -> None:
    """A tokenizer without an end of text, for pairs that are plain texts."""
    edited("tokenizer_config.json", eos_token=None)(folder)
    record = json.dumps({"prompt": "One and", "chosen": " two", "rejected": " six"})
    (folder / "texts.jsonl").write_text(f"{record}\n" * 4)


def set_template(template: str | None) -> Before:
    """Replace the chat template; None removes it."""

    def change(model: Path) -> None:
        (model / "chat_template.jinja").unlink(missing_ok=True)
        content = json.loads((model / "tokenizer_config.json").read_text())
        content.pop("chat_template", None)
        (model / "tokenizer_config.json").write_text(json.dumps(content))
        if template is not None:
            (model / "chat_template.jinja").write_text(template)

    return changed(change)


NORM = "model.norm.weight"
# fmt: off
CASES = [
    Case("missing model", "model.path=./nowhere", "neither a local folder", "model.path", "./nowhere",
         to_do="check the path"),
    Case("file as model", f"{BROKEN}/model.gguf", "a file, not a folder", "model.path", "model.gguf",
         before=changed(lambda model: (model / "model.gguf").touch()), to_do="name the folder"),
    Case("invalid hub name", "model.path=org--name",
         "the model is neither a local folder nor found", "model.path", "org--name",
         to_do="check the path or the hub name", joins=True),
    Case("run directory as model", BROKEN, "no config.json", "model.path", "broken",
         before=run_directory, to_do="write broken/model"),
    Case("no weights", BROKEN, "no weights", "model.path", "broken",
         before=changed(lambda model: (model / "model.safetensors").unlink()),
         to_do="set model.path to a complete model"),
    Case("missing shard", BROKEN, "a weight file", "model.path", "model-00002-of-00002.safetensors",
         before=indexed('{"weight_map": {"lm_head.weight": "model-00002-of-00002.safetensors"}}'),
         to_do="download or copy the file again"),
    Case("truncated weights", BROKEN,
         "a weight file of the model cannot be read", "", "broken", before=changed(truncated),
         to_do="download or copy the file again"),
    Case("missing tensor", BROKEN, "lacks weights", "model.path", NORM,
         before=with_weights(lambda t: t.pop(NORM)), joins=True, to_do="set model.path to a complete model"),
    Case("weights that are nan", BROKEN, "the model's own forward cannot score", "model.path", "not finite",
         joins=True, before=with_weights(lambda t: t[NORM].fill_(float("nan"))),
         to_do="check the weights"),
    Case("more layers than configured", BROKEN, "does not read", "model.path", "model.layers.1",
         before=edited("config.json", num_hidden_layers=1, layer_types=None), joins=True,
         to_do="such as num_hidden_layers"),
    Case("config that is no JSON", BROKEN, "cannot be read", "config.json", "",
         before=rewritten("config.json", "{"), to_do="download or save the model again"),
    Case("unknown architecture", BROKEN, "config.json cannot be read", "model.path", "gpt9", joins=True,
         before=edited("config.json", model_type="gpt9"), to_do="download or save the model again"),
    Case("quantized weights", BROKEN, "quantized", "model.path", "gptq", joins=True,
         before=edited("config.json", quantization_config={"quant_method": "gptq", "bits": 4}),
         to_do="use the original model"),
    Case("broken tokenizer", BROKEN, "tokenizer cannot be loaded", "model.path", "broken", joins=True,
         before=rewritten("tokenizer.json", "{"), to_do="put the tokenizer's files beside"),
    Case("no end of text", "model.path=broken data.train=[texts.jsonl] data.text_as_messages=false",
         "no end-of-sequence token", "tokenizer of model.path", joins=True, before=without_end_of_text,
         to_do="set eos_token in the model's tokenizer_config.json"),
    Case("no chat template", BROKEN, "chat template", "", "", "", "data.chat_template",
         before=set_template(None), joins=True),
    Case("template that does not compile", BROKEN, "template", "", "",
         before=set_template("{% for m in messages %}"), joins=True, to_do="correct the template"),
    Case("template that raises", BROKEN,
         "records cannot be used", "", "", before=set_template("{{ raise_exception('no') }}"),
         joins=True, to_do="write the turns as the chat template"),
    Case("revision of a folder", "model.revision=main", "no effect", "model.revision", "main",
         to_do="remove model.revision"),
    Case("reference of another vocabulary", "reference.path=broken",
         "other sizes than config.json", "reference.path", "700 x 32 by config.json",
         before=edited("config.json", vocab_size=700), joins=True, to_do="correct config.json (vocab_size)"),
    Case("adapter that is missing", "'model.adapter={path: ./nowhere}'", "neither a local folder",
         "model.adapter.path", "./nowhere", to_do="check the path"),
    Case("whole model as adapter", "'model.adapter={path: model}'", "a whole model, not an adapter",
         "model.adapter.path", "model", to_do="model.path=model"),
]
# fmt: on


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_model_that_cannot_be_trained_gets_one_block(case: Case, check: Check) -> None:
    check(case)
