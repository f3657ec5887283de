"""A process reads its own experts: what lies in the files for the others never reaches it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dpo_dist.config.schema import Dtype, ModelConfig, Quantization
from dpo_dist.foundation.errors import ConfigError
from dpo_dist.model.experts import ExpertShare, expert_weights
from dpo_dist.model.files.folder import weight_files
from dpo_dist.model.files.load import check_contents, load_config, load_weights
from dpo_dist.model.files.own_experts import OwnExperts
from dpo_dist.model.files.stored import open_plain
from tests.support.families import tiny_causal_lm, tiny_config
from tests.support.stored import quantize_fp8, quantize_mxfp4, spoil

pytestmark = pytest.mark.slow


CPU = torch.device("cpu")
FP32 = ModelConfig(dtype=Dtype.fp32)
EXPERTS = 12
WIDE = {"hidden_size": 64, "intermediate_size": 128, "moe_intermediate_size": 64, "head_dim": 16}
NUMBERS = ("num_experts", "num_local_experts", "n_routed_experts")
# Files with a tensor for each expert, with stacked ones, and with both in numbers of 4 and 8 bits.
CASES: dict[str, tuple[str, Callable[[Path], None] | None]] = {
    "qwen3_moe": ("qwen3_moe", None),
    "mixtral": ("mixtral", None),
    "granitemoe": ("granitemoe", None),
    "gpt_oss": ("gpt_oss", None),
    "deepseek_v3 in FP8": ("deepseek_v3", quantize_fp8),
    "gpt_oss in MXFP4": ("gpt_oss", quantize_mxfp4),
}


def written(folder: Path, case: str) -> Path:
    """A mixture with experts of two digits, in several files if it is not quantized."""
    family, quantize = CASES[case]
    causal_lm = tiny_causal_lm(tiny_config(family, **WIDE, **dict.fromkeys(NUMBERS, EXPERTS)))
    if quantize is None:
        causal_lm.save_pretrained(folder, max_shard_size="500KB")
        assert len(weight_files(folder)) > 1
    else:
        causal_lm.save_pretrained(folder)
        quantize(folder)
    return folder


def own_experts(folder: Path, share: ExpertShare) -> OwnExperts:
    described = check_contents(folder, load_config(folder, FP32), FP32)
    open_file = open_plain(folder, torch.float32)
    return OwnExperts(described, folder, open_file, expert_weights(described), share)


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("case", CASES)
def test_the_shares_of_all_processes_are_the_weights_that_one_loads(
    case: str, ranks: int, tmp_path: Path
) -> None:
    folder = written(tmp_path, case)
    whole = load_weights(folder, load_config(folder, FP32), FP32, CPU)
    shares = [own_experts(folder, ExpertShare(rank, ranks)) for rank in range(ranks)]
    for name in expert_weights(whole):
        pieces = [share.read(name) for share in shares]
        assert [piece.shape for piece in pieces] == [share.shapes[name] for share in shares]
        assert torch.equal(torch.cat(pieces).float(), whole.get_parameter(name)), name


@pytest.mark.parametrize("kind", Quantization)
@pytest.mark.parametrize("case", ["qwen3_moe", "gpt_oss"])
def test_a_process_packs_its_own_experts_only(case: str, kind: Quantization, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    config = ModelConfig(dtype=Dtype.fp32, quantization=kind)
    share = ExpertShare(1, 3)

    def loaded() -> Any:
        return load_weights(folder, load_config(folder, config), config, CPU, share=share)

    folder = written(tmp_path, case)
    expected = dict(loaded().named_parameters())
    spoil(folder, own_experts(folder, share).rows)
    for name, weight in loaded().named_parameters():
        assert weight.is_floating_point() or torch.equal(weight, expected[name]), name
    packed = [weight for name, weight in expected.items() if name.endswith("experts.down_proj")]
    bits = 4 if kind is Quantization.nf4 else 8
    width = WIDE["intermediate_size" if case == "gpt_oss" else "moe_intermediate_size"]
    assert {8 * weight.numel() / bits for weight in packed} == {EXPERTS / 3 * 64 * width}


def test_experts_in_tensors_of_another_kind_are_refused(tmp_path: Path) -> None:
    folder = written(tmp_path, "granitemoe")
    share = ExpertShare(0, 2)
    described = check_contents(folder, load_config(folder, FP32), FP32)
    names = {"model.embed_tokens.weight"}
    described.get_input_embeddings().weight = torch.nn.Parameter(torch.empty(4, 64, device="meta"))
    with pytest.raises(ConfigError, match="cannot be read apart") as raised:
        OwnExperts(described, folder, open_plain(folder, torch.float32), names, share)
    assert "model.embed_tokens.weight of 4 experts, in 1 tensors" in str(raised.value.got)
