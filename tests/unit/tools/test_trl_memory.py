"""What a script has changed in a model or a tokenizer in memory trains as it is, or an error names it."""

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from dpo_dist.foundation.errors import ConfigError
from dpo_dist.trl import DPOConfig, DPOTrainer
from dpo_dist.trl.unseen import hooks
from tests.support.families import tiny_causal_lm, tiny_config
from tests.support.multimodal import image_model
from tests.support.pages import in_process
from tests.support.tiny_model import write_model
from tests.support.warm import ENVIRONMENT

pytestmark = pytest.mark.slow

PAIRS = [{"prompt": f"q{number}", "chosen": f" yes {number}", "rejected": " no"} for number in range(4)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


def refusal(output: Path, **given: Any) -> tuple[str, str]:
    with pytest.raises(ConfigError) as raised:
        DPOTrainer(args=DPOConfig(output_dir=str(output)), train_dataset=PAIRS, **given)
    return raised.value.where, raised.value.got


class Half(nn.Linear):
    def forward(self, hidden: Any) -> Any:
        return super().forward(hidden) / 2


class Double(nn.Module):
    def forward(self, weight: Any) -> Any:
        return weight * 2


def submodule(model: Any) -> None:
    old = model.model.layers[0].mlp.down_proj
    model.model.layers[0].mlp.down_proj = new = Half(old.in_features, old.out_features, bias=False)
    new.weight = old.weight


def swapped(model: Any) -> None:
    model.model.norm.__class__ = type("Mine", (type(model.model.norm),), {})


def attribute(model: Any) -> None:
    model.model.layers[1].self_attn.scaling = 0.01


def frequencies(model: Any) -> None:
    model.model.rotary_emb.inv_freq.mul_(0.1)


def config(model: Any) -> None:
    model.config.rms_norm_eps = 0.5


def dropped(model: Any) -> None:
    model.model.layers = model.model.layers[:1]


def identity(model: Any) -> None:
    model.model.layers[0].post_attention_layernorm = nn.Identity()


def parametrized(model: Any) -> None:
    nn.utils.parametrize.register_parametrization(model.lm_head, "weight", Double(), unsafe=True)


def added(model: Any) -> None:
    model.model.more = nn.Linear(2, 2)


def with_bias(model: Any) -> None:
    model.lm_head.bias = nn.Parameter(torch.ones(model.config.vocab_size))


def wrapped_forward(model: Any) -> None:
    forward = model.forward

    @functools.wraps(forward)
    def cooler(*given: Any, **named: Any) -> Any:
        found = forward(*given, **named)
        found.logits = found.logits / 2
        return found

    model.forward = cooler


def wrapped_hook(model: Any) -> None:
    layer = model.model.layers[0]
    layer.register_forward_hook(functools.wraps(layer.forward)(lambda module, given, out: out))


CHANGES = [
    (submodule, "a Half as model.layers.0.mlp.down_proj"),
    (swapped, "a Mine as model.norm"),
    (attribute, "model.layers.1.self_attn.scaling of 0.01, where its config makes 0.35"),
    (frequencies, "another model.rotary_emb.inv_freq"),
    (config, "model.layers.0.input_layernorm.variance_epsilon of 1e-06, where its config makes 0.5"),
    (dropped, "a model without model.layers.1"),
    (identity, "a Identity as model.layers.0.post_attention_layernorm"),
    (parametrized, "a ParametrizedLinear as lm_head"),
    (added, "a model with model.more"),
    (with_bias, "lm_head.bias.shape of"),
    (wrapped_forward, "another forward of the model"),
    (wrapped_hook, "a hook on model.layers.0"),
]


@pytest.mark.parametrize(("change", "named"), CHANGES, ids=[change.__name__ for change, _ in CHANGES])
def test_a_changed_structure_of_a_model_is_refused_by_its_name(
    change: Callable[[Any], None], named: str, folder: Path, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    change(model)
    for place in ("model", "ref_model"):
        where, got = refusal(tmp_path, **{"model": str(folder), place: model})
        assert where == place
        assert got.startswith(named)


def test_a_changed_structure_below_an_adapter_is_refused(folder: Path, tmp_path: Path) -> None:
    below = AutoModelForCausalLM.from_pretrained(folder)
    attribute(below)
    adapted = get_peft_model(below, LoraConfig(r=2, target_modules="all-linear"))
    where, got = refusal(tmp_path, model=adapted)
    assert where == "model"
    assert got.startswith("model.layers.1.self_attn.scaling")
    swapped(below)  # a module that has no adapter
    below.model.layers[1].self_attn.scaling = 8**-0.5
    assert refusal(tmp_path, model=adapted) == ("model", "a Mine as model.norm")


FAMILIES = (
    *("llama", "qwen2", "qwen3_moe", "mistral", "gemma2", "gemma3n_text", "gpt2", "gpt_oss", "deepseek_v3"),
    *("codegen", "bamba", "phi3", "granite", "opt", "falcon", "mpt", "llama4_text", "qwen3_next"),
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_what_scripts_usually_do_to_a_model_is_not_refused(family: str, dtype: torch.dtype) -> None:
    moved = tiny_causal_lm(tiny_config(family))
    torch.manual_seed(0)
    state = torch.random.get_rng_state()
    assert not hooks(moved, "model")
    assert torch.equal(torch.random.get_rng_state(), state), "a script's random numbers stay its own"
    with torch.no_grad():
        moved(torch.arange(5, 30)[None])
    moved.train().to(dtype)
    moved.config.use_cache, moved.config.pad_token_id = False, 2
    moved.generation_config.max_new_tokens = 3
    if moved.supports_gradient_checkpointing:
        moved.gradient_checkpointing_enable()
        moved.enable_input_require_grads()
    assert not hooks(moved, "model")
    assert not hooks(moved.to(torch.float32), "model"), "buffers stay rounded"
    moved.resize_token_embeddings(moved.config.vocab_size + 3)
    assert not hooks(moved, "model")
    made = AutoModelForCausalLM.from_config(tiny_config(family), dtype=dtype, attn_implementation="eager")
    assert not hooks(made, "model")
    targets = ["q_proj"] if family == "bamba" else "all-linear"  # peft adapts no layers of Mamba
    adapted = get_peft_model(made, LoraConfig(r=2, target_modules=targets, modules_to_save=["lm_head"]))
    assert not hooks(adapted, "model")


def test_a_compiled_forward_is_no_other_one(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.forward = torch.compile(model.forward, backend="eager")
    assert not hooks(model, "model")


@pytest.mark.parametrize("kind", ["gemma3", "llava", "qwen2_5_vl"])
def test_models_with_an_image_tower_are_not_refused(kind: str) -> None:
    model = image_model(kind, 97)
    assert not hooks(model, "model")
    assert not hooks(model.to(torch.bfloat16), "model")


def test_longer_sequences_than_the_model_was_made_for_change_no_structure() -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 2.0}
    model = tiny_causal_lm(tiny_config("llama", max_position_embeddings=16, rope_parameters=rope))
    before = model.model.rotary_emb.inv_freq.clone()
    with torch.no_grad():
        model(torch.arange(5, 45)[None])
    assert not torch.equal(model.model.rotary_emb.inv_freq, before)
    assert not hooks(model, "model")


def test_a_compiled_model_trains_as_the_one_inside(folder: Path, tmp_path: Path) -> None:
    model, reference = (AutoModelForCausalLM.from_pretrained(folder) for _ in range(2))
    args = DPOConfig(output_dir=str(tmp_path))
    compiled = [torch.compile(part, backend="eager") for part in (model, reference)]
    trainer = DPOTrainer(*compiled, args=args, train_dataset=PAIRS)
    assert trainer.model is model
    assert trainer.ref_model is reference
    assert refusal(tmp_path, model=torch.compile(hooked(folder), backend="eager"))[1] == "a hook on lm_head"


def hooked(folder: Path) -> Any:
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.lm_head.register_forward_hook(lambda module, given, out: out / 2)
    return model


def test_a_tokenizer_with_methods_of_the_script_is_refused(folder: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)

    class Upper(type(tokenizer)):  # type: ignore[misc]
        def __call__(self, text: Any = None, *given: Any, **named: Any) -> Any:
            return super().__call__(text.upper(), *given, **named)

    mine = Upper.from_pretrained(folder)
    found = refusal(tmp_path, model=str(folder), processing_class=mine)
    assert found == ("processing_class", "a class of its own, Upper")
    args = DPOConfig(output_dir=str(tmp_path / "usual"))
    trainer = DPOTrainer(str(folder), args=args, train_dataset=PAIRS, processing_class=tokenizer)
    tokenizer.apply_chat_template = functools.partial(tokenizer.apply_chat_template, extra=True)
    where, got = refusal(tmp_path, model=str(folder), processing_class=tokenizer)
    assert where == "processing_class"
    assert got.startswith("another apply_chat_template of a ")
    with pytest.raises(ConfigError, match=r"trainer\.processing_class\s+got: +another apply_chat_template"):
        trainer.train()


def zeros(model: Any) -> None:
    next(weight for name, weight in model.named_parameters() if "lora_B" in name).data.add_(1)


def norm(model: Any) -> None:
    with torch.no_grad():
        model.model.norm.weight.fill_(7.0)


def data(model: Any) -> None:
    model.model.layers[0].mlp.up_proj.weight.data.mul_(0.5)


def freezes(model: Any) -> None:
    model.model.norm.requires_grad_(False)


def looks(model: Any) -> None:
    model.eval()
    model.generate(torch.tensor([[5, 6]]), max_new_tokens=2, do_sample=False)


class Edit(TrainerCallback):  # type: ignore[misc]
    def __init__(self, change: Callable[[Any], None]) -> None:
        self.change, self.steps = change, 0

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.steps += 1
        if self.steps == 2:
            self.change(model)


def train_by(folder: Path, change: str, output: Path) -> None:
    os.environ.update(ENVIRONMENT)
    adapter = LoraConfig(r=2) if change == "zeros" else None
    args = DPOConfig(
        output_dir=str(output),
        per_device_train_batch_size=2,
        max_steps=3,
        bf16=change == "data",
        use_cpu=True,
        report_to="none",
        save_strategy="no",
    )
    edit = Edit(globals()[change])
    trainer = DPOTrainer(str(folder), args=args, train_dataset=PAIRS, callbacks=[edit], peft_config=adapter)
    named = {
        "zeros": r"Edit\.on_step_end that changes base_model\.model\.\S+lora_B",
        "norm": r"Edit\.on_step_end that changes model\.norm\.weight",
        "data": r"Edit\.on_step_end that changes model\.layers\.0\.mlp\.up_proj\.weight",
        "freezes": r"Edit\.on_step_end that freezes or unfreezes model\.norm\.weight",
    }
    if change == "looks":
        trainer.train()
        assert edit.steps == 3
    else:
        with pytest.raises(ConfigError, match=named[change]):
            trainer.train()
        assert edit.steps == 2


@pytest.mark.parametrize("change", ["zeros", "norm", "data", "freezes", "looks"])
def test_a_callback_that_changes_weights_is_refused_by_its_name(
    change: str, folder: Path, tmp_path: Path
) -> None:
    in_process(train_by, folder, change, tmp_path)
