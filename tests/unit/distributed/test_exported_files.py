"""Files beside the weights of an exported model: those of the tokenizer, and of what reads images."""

from pathlib import Path

import pytest

from dpo_dist.config.schema import AdapterConfig, Dtype
from dpo_dist.config.verb_options import ExportConfig
from dpo_dist.distributed.export import export_checkpoint
from tests.support import tiny
from tests.support.multimodal import write_multimodal
from tests.unit.distributed.test_checkpoint_export import checkpoint_of, run_of, weights_of

TOKENIZER = ("special_tokens_map.json", "tokenizer.model", "tokenizer.model.v3", "tekken.json")
PROCESSORS = {"preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"}


def write_base(folder: Path, model_type: str) -> Path:
    write_multimodal(folder, model_type, len(tiny.qwen()))
    tiny.qwen().save_pretrained(folder)
    for name in TOKENIZER:
        (folder / name).write_text('{"eos_token": "<|im_end|>"}')
    for name in PROCESSORS:
        (folder / name).write_text(f'{{"of": "{name}"}}')
    return folder


@pytest.mark.parametrize(
    ("model_type", "adapter", "reads_images"),
    [("gemma3", None, True), ("qwen3_5", None, False), ("gemma3", AdapterConfig(r=2), True)],
)
def test_a_model_has_the_files_of_its_inputs(
    model_type: str, adapter: AdapterConfig | None, reads_images: bool, tmp_path: Path
) -> None:
    """A model of images and text needs them to be served; its text alone (qwen3_5) reads no images."""
    base, out = write_base(tmp_path / "base", model_type), tmp_path / "out"
    config = run_of(base, dtype=Dtype.fp32, adapter=adapter, export=ExportConfig(merge=adapter is not None))
    export_checkpoint(checkpoint_of(weights_of(config), tmp_path / "step-000001"), out, config)
    assert {name for name in PROCESSORS if (out / name).exists()} == (PROCESSORS if reads_images else set())
    for file in (*TOKENIZER, *(PROCESSORS if reads_images else ())):
        assert (out / file).read_bytes() == (base / file).read_bytes()
