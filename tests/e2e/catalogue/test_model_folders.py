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
    """Change values in a JSON file of the model; None removes one."""

    def edit(model: Path) -> None:
        content = json.loads((model / name).read_text()) | values
        kept = {key: value for key, value in content.items() if value is not None}
        (model / name).write_text(json.dumps(kept))

    return changed(edit)


def without(*patterns: str) -> Before:
    """Remove files of the model."""

    def remove(model: Path) -> None:
        for pattern in patterns:
            for file in model.glob(pattern):
                file.unlink()

    return changed(remove)


def rewritten(name: str, content: str | bytes) -> Before:
    """Replace a file of the model."""
    return changed(
        lambda model: (model / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    )


def with_weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Before:
    """Change the tensors of the model."""

    def rewrite(model: Path) -> None:
        tensors = load_file(model / "model.safetensors")
        change(tensors)
        save_file(tensors, model / "model.safetensors", {"format": "pt"})

    return changed(rewrite)


def sharded(model: Path) -> None:
    """An index that names a shard that does not exist."""
    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    names = sorted(tensors)
    save_file(
        {name: tensors[name] for name in names[::2]},
        model / "model-00001-of-00002.safetensors",
        {"format": "pt"},
    )
    weight_map = {
        name: f"model-0000{1 + number % 2}-of-00002.safetensors" for number, name in enumerate(names)
    }
    (model / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )


def unmapped(model: Path) -> None:
    """An index that names no files."""
    (model / "model.safetensors").rename(model / "model-00001-of-00001.safetensors")
    (model / "model.safetensors.index.json").write_text("{}")


def pickled(model: Path) -> None:
    """Weights as a pickle."""
    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    torch.save(tensors, model / "pytorch_model.bin")


def truncated(model: Path) -> None:
    """Weights of which the end is missing."""
    content = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(content[: len(content) // 2])


def adapter_folder(folder: Path) -> None:
    """A folder of an adapter."""
    (folder / "broken").mkdir()
    (folder / "broken/adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    (folder / "broken/adapter_model.safetensors").write_bytes(b"")


def run_directory(folder: Path) -> None:
    """A folder with a model in a folder below."""
    shutil.copytree((folder / "model").resolve(), folder / "broken/model")


def without_end_of_text(folder: Path) -> None:
    """A tokenizer without an end of text, for pairs that are plain texts."""
    changed(lambda model: edited_in(model, "tokenizer_config.json", eos_token=None))(folder)
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


LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"
NORM = "model.norm.weight"
# fmt: off
CASES = [
    Case("missing model", "model.path=./nowhere", "does not exist", "model.path", "./nowhere",
         to_do="check the path"),
    Case("file as model", "model.path=train.jsonl", "does not exist", "model.path", "train.jsonl",
         to_do="check the path"),
    Case("hub name offline", "model.path=org/name", "neither a local folder nor a model found", "model.path",
         "org/name", to_do="check the path or the hub name"),
    Case("invalid hub name", "model.path=org--name",
         "the model is neither a local folder nor a", "model.path", "org--name",
         to_do="check the path or the hub name"),
    Case("run directory as model", BROKEN, "no config.json", "model.path", "broken", to_do="name the folder",
         before=run_directory),
    Case("adapter as model", BROKEN, "no config.json", "model.path", "an adapter", before=adapter_folder,
         to_do="merge it into its base"),
    Case("no weights", BROKEN, "no weights", "model.path", "broken", before=without("*.safetensors"),
         to_do="set model.path to a complete model"),
    Case("pickle weights", BROKEN, "the weights are pickled", "model.path", "pytorch_model.bin",
         "weights in safetensors", "convert them once", before=changed(pickled)),
    Case("missing shard", BROKEN, "a weight file", "model.path", "model-00002-of-00002.safetensors",
         before=changed(sharded), to_do="download or copy the file again"),
    Case("index without weight map", BROKEN, "no weight_map", "model.safetensors.index.json",
         before=changed(unmapped), to_do="download or save the model again"),
    Case("truncated weights", BROKEN,
         "a weight file of the model cannot be read", "", "broken", before=changed(truncated),
         to_do="download or copy the file again"),
    Case("weights that are no safetensors", BROKEN, "a weight file of the model cannot be read", "", "broken",
         before=rewritten("model.safetensors", "<html>"), to_do="download or copy the file again"),
    Case("git-lfs pointer", BROKEN,
         "a weight file of the model cannot be read", "", "broken",
         before=rewritten("model.safetensors", LFS),
         to_do="download or copy the file again"),
    Case("wrong shapes", BROKEN,
         "the model cannot be loaded", "model.path", "", before=edited("config.json", intermediate_size=48),
         joins=True, to_do="download or save the model again"),
    Case("missing tensor", BROKEN, "lacks weights", "model.path", NORM,
         before=with_weights(lambda t: t.pop(NORM)), joins=True, to_do="set model.path to a complete model"),
    Case("tensor that nobody reads", BROKEN, "does not read", "model.path", "model.norm.bias", joins=True,
         before=with_weights(lambda t: t.update({"model.norm.bias": t[NORM].clone()})),
         to_do="check model_type and the options in"),
    Case("weights that are nan", BROKEN, "the model's own forward cannot score", "model.path", "not finite",
         joins=True, before=with_weights(lambda t: t[NORM].fill_(float("nan"))),
         to_do="check the weights"),
    Case("fewer layers than configured", BROKEN, "lacks weights", "model.path", "model.layers.2",
         before=edited("config.json", num_hidden_layers=3, layer_types=None), joins=True,
         to_do="set model.path to a complete model"),
    Case("more layers than configured", BROKEN, "does not read", "model.path", "model.layers.1",
         before=edited("config.json", num_hidden_layers=1, layer_types=None), joins=True,
         to_do="such as num_hidden_layers"),
    Case("config that is no JSON", BROKEN, "cannot be read", "config.json", "",
         before=rewritten("config.json", "{"), to_do="download or save the model again"),
    Case("config without a type", BROKEN, "config.json cannot be read", "model.path", "broken", joins=True,
         before=rewritten("config.json", "{}"), to_do="download or save the model again"),
    Case("unknown architecture", BROKEN, "config.json cannot be read", "model.path", "gpt9", joins=True,
         before=edited("config.json", model_type="gpt9"), to_do="download or save the model again"),
    Case("own code without its file", f"{BROKEN} model.trust_remote_code=true", "cannot make a causal",
         "model.path", "code.py", joins=True,
         before=edited("config.json", auto_map={"AutoModelForCausalLM": "code.Model"}),
         to_do="check config.json against that of the"),
    Case("quantized weights", BROKEN, "quantized", "model.path", "gptq", joins=True,
         before=edited("config.json", quantization_config={"quant_method": "gptq", "bits": 4}),
         to_do="use the original model"),
    Case("no tokenizer", BROKEN, "no tokenizer", "model.path", "broken", "tokenizer.json",
         before=without("tokenizer*", "vocab*"), to_do="put the tokenizer's files beside"),
    Case("broken tokenizer", BROKEN, "tokenizer cannot be loaded", "model.path", "broken", joins=True,
         before=rewritten("tokenizer.json", "{"), to_do="put the tokenizer's files beside"),
    Case("vocabulary above the embedding", BROKEN, "without an embedding", "model.path", "id 426",
         before=edited("config.json", vocab_size=300), joins=True,
         to_do="use the tokenizer that belongs to the"),
    Case("vocabulary above the embedding of weights", BROKEN,
         "the data contain a token without an", "", "", joins=True,
         before=changed(lambda m: (edited_in(m, "config.json", vocab_size=300), cut_embedding(m))),
         to_do="use the tokenizer that belongs to the"),
    Case("no end of text", "model.path=broken data.train=[texts.jsonl]", "no end-of-sequence token",
         "tokenizer of model.path", joins=True, before=without_end_of_text,
         to_do="set eos_token in the model's tokenizer_config.json"),
    Case("no chat template", BROKEN, "chat template", "", "", "", "data.chat_template",
         before=set_template(None), joins=True),
    Case("template that does not compile", BROKEN, "template", "", "",
         before=set_template("{% for m in messages %}"), joins=True, to_do="correct the template"),
    Case("template that raises", BROKEN,
         "no record can be used", "", "", before=set_template("{{ raise_exception('no') }}"),
         joins=True, to_do="write the turns as the chat template"),
    Case("missing template file", "data.chat_template=mine.jinja", "template", "data.chat_template",
         "mine.jinja", to_do="correct the path"),
    Case("template of other messages", BROKEN,
         "no record can be used", "", "", before=set_template("{{ 1 / 0 }}"), joins=True,
         to_do="write the turns as the chat template"),
    Case("revision of a folder", "model.revision=main", "no effect", "model.revision", "main",
         to_do="remove it"),
    Case("liger without the package", "model.liger=true", "liger-kernel is not installed", "model.liger",
         to_do="pip install 'dpo-dist[liger]'"),
    Case("flash attention without a GPU", "model.dtype=bf16 model.attention=flash_attention_2",
         "runs on CUDA only", "model.attention", "flash_attention_2 on cpu", "sdpa", "model.attention=auto",
         joins=True),
    Case("flash attention in 32 bits", "model.attention=flash_attention_2",
         "flash_attention_2 computes in 16 bits only", "model.attention",
         to_do="set model.attention=sdpa or"),
    Case("quantized weights that ZeRO would shard", "model.quantization=nf4 'model.adapter={r: 8}'",
         "ZeRO would separate quantized weights from", "model.quantization",
         to_do="choose parallelism=ddp"),
    Case("target that the model lacks", "'model.adapter={r: 8, target_modules: [nope_proj]}'",
         "an adapter's target is not a linear layer",
         "target_modules", "nope_proj", joins=True, to_do="name existing layers"),
    Case("reference of another vocabulary", "reference.path=broken",
         "the model cannot be loaded", "reference.path", "",
         before=edited("config.json", vocab_size=700), joins=True, to_do="download or save the model again"),
    Case("adapter that is missing", "'model.adapter={path: ./nowhere}'", "does not exist",
         "model.adapter.path", "./nowhere", to_do="check the path"),
    Case("reference that is missing", "reference.path=./nowhere", "does not exist", "reference.path",
         "./nowhere", to_do="check the path"),
    Case("eight heads of a size that does not fit", BROKEN, "the model cannot be loaded", "model.path", "",
         before=edited("config.json", num_attention_heads=5), joins=True,
         to_do="download or save the model again"),
]
# fmt: on


def edited_in(model: Path, name: str, **values: Any) -> None:
    """Change values in a JSON file."""
    (model / name).write_text(json.dumps(json.loads((model / name).read_text()) | values))


def cut_embedding(model: Path) -> None:
    """Cut the embedding to 300 rows."""
    tensors = load_file(model / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if name in tensors:
            tensors[name] = tensors[name][:300].clone()
    save_file(tensors, model / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_model_that_cannot_be_trained_gets_one_block(case: Case, check: Check) -> None:
    check(case)
