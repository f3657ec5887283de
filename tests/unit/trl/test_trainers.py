"""TRL's trainers by our import have TRL's losses, values and weights, and leave models as TRL does."""

import copy
import functools
import inspect
import json
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import trl
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl.trainer.utils import add_fused_lm_head

from dpo_dist import trl as guest
from dpo_dist.trl import older_names, trainers
from dpo_dist.trl.forward import why_padded
from tests.support.lookups import recorded_lookups

pytestmark = pytest.mark.slow

STEPS = 3
CASES: dict[str, dict[str, Any]] = {
    "all weights": {},
    "losses with weights, gradient checkpointing off": {
        "loss_type": ["sigmoid", "ipo", "sft"],
        "loss_weights": [1.0, 0.2, 0.5],
        "gradient_checkpointing": False,
    },
    "label smoothing, reentrant": {
        "label_smoothing": 0.1,
        "loss_type": "robust",
        "gradient_checkpointing_kwargs": {"use_reentrant": True},
    },
    "precomputed by the adapter's base": {"precompute_ref_log_probs": True, "adapter": "new"},
    "a new adapter, reentrant, cut at the right": {
        "adapter": "new",
        "gradient_checkpointing_kwargs": {"use_reentrant": True},
        "max_length": 24,
    },
    "a continued adapter, ld_alpha": {"adapter": "continued", "ld_alpha": 0.5},
    "precomputed, ld_alpha, cut at the left": {
        "precompute_ref_log_probs": True,
        "ld_alpha": 0.5,
        "max_length": 24,
        "truncation_mode": "keep_end",
    },
    "a synced reference": {"sync_ref_model": True, "ref_model_sync_steps": 1},
    "one pair, weighting": {
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 2,
        "use_weighting": True,
    },
    "bf16": {"bf16": True},
    "KTO": {"kind": "KTO"},
    "KTO, an adapter": {"kind": "KTO", "adapter": "new"},
    "KTO, apo, precomputed": {
        "kind": "KTO",
        "precompute_ref_log_probs": True,
        "loss_type": "apo_zero_unpaired",
    },
    "KTO, bf16": {"kind": "KTO", "bf16": True},
}


def arguments(kind: str = "DPO", **given: Any) -> Any:
    usual = {
        "output_dir": "out",
        "per_device_train_batch_size": 4,
        "max_steps": STEPS,
        "logging_steps": 1,
        "learning_rate": 0.05,
        "optim": "sgd",  # Adam would make steps of gradients that are nothing but rounding
        "lr_scheduler_type": "constant",
        "report_to": "none",
        "save_strategy": "no",
        "bf16": False,
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return getattr(guest, f"{kind}Config")(**{**usual, **given})


def lora() -> LoraConfig:
    return LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def trainer_of(home: Any, folder: Path, data: Any, **case: Any) -> Any:
    """A trainer of TRL, or ours (`home`)."""
    torch.manual_seed(0)
    kind, adapter = case.pop("kind", "DPO"), case.pop("adapter", None)
    options = {name: case.pop(name) for name in ("callbacks", "ref_model", "eval_dataset") if name in case}
    kind_of_trainer = case.pop("trainer", getattr(home, f"{kind}Trainer"))
    model = load(folder)
    if adapter == "continued":
        model = get_peft_model(model, lora())
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if "lora_B" in name:
                    weight.normal_(std=0.3)
    elif adapter == "new":
        options["peft_config"] = lora()
    elif "ref_model" not in options:
        options["ref_model"] = load(folder / "reference")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    args = arguments(kind, **case)
    return kind_of_trainer(model=model, args=args, train_dataset=data, processing_class=tokenizer, **options)


def weights_of(trainer: Any) -> dict[str, Tensor]:
    return {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}


def rows_of(trainer: Any) -> list[dict[str, float]]:
    timed = ("runtime", "per_second", "flos")
    return [
        {name: value for name, value in row.items() if not name.endswith(timed)}
        for row in trainer.state.log_history
    ]


def assert_same(ours: Any, theirs: Any, *, exact: float = 1e-5, weights: float = 2e-5) -> None:
    rows, wanted = rows_of(ours), rows_of(theirs)
    assert [row.keys() for row in rows] == [row.keys() for row in wanted]
    for row, other in zip(rows, wanted, strict=True):
        if abs(other.get("rewards/margins", 1)) < 1e-6:  # which of two equal rewards is higher is rounding
            row["rewards/accuracies"] = other["rewards/accuracies"]
        assert row == pytest.approx(other, rel=exact, abs=exact)
    trained = weights_of(theirs)
    for name, weight in weights_of(ours).items():
        torch.testing.assert_close(weight, trained[name], rtol=0, atol=weights, msg=name)


def is_packed(trainer: Any, said: str) -> bool:
    return "rows are packed" in said and "TRL's own forward" not in said


@pytest.mark.parametrize("name", CASES)
def test_losses_values_and_weights_are_those_of_trl(
    name: str, folder: Path, pairs: Any, caplog: pytest.LogCaptureFixture
) -> None:
    trained = []
    for home in (trl, guest):
        trainer = trainer_of(home, folder, pairs, **CASES[name])
        trainer.train()
        trained.append(trainer)
    theirs, ours = trained
    is_bf16 = CASES[name].get("bf16", False)
    assert_same(ours, theirs, exact=2e-2 if is_bf16 else 1e-5, weights=5e-3 if is_bf16 else 2e-5)
    assert is_packed(ours, caplog.text)
    assert isinstance(ours, getattr(trl, f"{CASES[name].get('kind', 'DPO')}Trainer"))


def test_evaluations_are_those_of_trl(folder: Path, pairs: Any) -> None:
    results = []
    for home in (trl, guest):
        trainer = trainer_of(home, folder, pairs, eval_dataset={"one": pairs, "two": pairs.select([1, 2])})
        results.append(trainer.evaluate())
        results[-1] |= trainer.predict(trainer.eval_dataset["one"]).metrics
    theirs, ours = [
        {name: value for name, value in result.items() if "runtime" not in name and "per_second" not in name}
        for result in results
    ]
    assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-5)


def test_a_subclass_may_have_its_own_loss(folder: Path, pairs: Any, caplog: pytest.LogCaptureFixture) -> None:
    def doubled(home: Any) -> Any:
        class Doubled(home.DPOTrainer):  # type: ignore[misc]
            def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
                found = super().compute_loss(model, inputs, return_outputs=True)
                loss, outputs = found[0] * 2, found[1]
                assert outputs.logits.shape[:2] == inputs["input_ids"].shape
                return (loss, outputs) if return_outputs else loss

        return Doubled

    trained = [trainer_of(home, folder, pairs, trainer=doubled(home)) for home in (trl, guest)]
    for trainer in trained:
        trainer.train()
    assert_same(trained[1], trained[0])
    assert is_packed(trained[1], caplog.text)


def _set_dropout(model: Any, name: str) -> None:
    for module in model.modules():
        if hasattr(module, name) and (name != "p" or isinstance(module, torch.nn.Dropout)):
            setattr(module, name, 0.5)


@pytest.mark.parametrize(
    ("noise", "early"),
    [
        *(("dropout", False), ("neftune_noise_alpha", False)),
        *(("attention_dropout", True), ("dropout, set late", True)),
    ],
)
def test_noise_in_training_is_that_of_trl(
    noise: str,
    early: bool,
    folder: Path,
    pairs: Any,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def dropping() -> LoraConfig:
        return LoraConfig(r=4, target_modules=["q_proj"], lora_dropout=0.5)

    def noisy(folder: Path) -> Any:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        _set_dropout(model, noise)
        return model

    monkeypatch.setattr(f"{__name__}.lora", dropping)
    monkeypatch.setattr(f"{__name__}.load", noisy)
    case: dict[str, Any] = {"max_steps": 2, "eval_dataset": pairs.select([1, 2]), "eval_on_start": early}
    if noise == "neftune_noise_alpha":
        case |= {noise: 5.0}
    elif noise != "attention_dropout":
        case |= {"adapter": "new", "disable_dropout": noise != "dropout"}
    trained = []
    for home in (trl, guest):
        trained.append(trainer_of(home, folder, pairs, **case))
        if noise == "dropout, set late":
            _set_dropout(trained[-1].model, "p")
        trained[-1].train()
    was_packed = early and noise == "dropout, set late"
    assert_same(trained[1], trained[0], exact=1e-5 if was_packed else 0, weights=2e-5 if was_packed else 0)
    reason = noise.removesuffix(", set late")
    assert caplog.text.count(f"computed by TRL's own forward, with padding: {reason} is on") == 1


class Recorder:
    """Code of a script that reads what it gets, and changes nothing."""

    def __init__(self) -> None:
        self.shapes = list[torch.Size]()

    def hook(self, _module: Any, tensors: Any, *_: Any) -> None:
        for tensor in tensors:
            if isinstance(tensor, Tensor):
                self.shapes.append(tensor.shape)

    def replace(self, module: Any) -> None:
        """Replace a forward by one that looks like it."""
        own = module.forward

        @functools.wraps(own)
        def forward(hidden: Tensor) -> Any:
            self.shapes.append(hidden.shape)
            return own(hidden)

        module.forward = forward

    def wrap(self, layer: Any) -> None:
        recorder = self

        class Wrapped(torch.nn.Module):
            def __init__(self, own: Any) -> None:
                super().__init__()
                self.own = own

            def forward(self, hidden: Tensor) -> Any:
                recorder.shapes.append(hidden.shape)
                return self.own(hidden)

        layer.mlp = Wrapped(layer.mlp)


CODE: dict[str, Callable[[Recorder, Any], Any]] = {
    "a hook": lambda recorder, layer: layer.register_forward_hook(recorder.hook),
    "a hook before": lambda recorder, layer: layer.mlp.register_forward_pre_hook(recorder.hook),
    "a hook of gradients": lambda recorder, layer: layer.mlp.register_full_backward_hook(recorder.hook),
    "a hook before gradients": lambda recorder, layer: layer.mlp.register_full_backward_pre_hook(
        recorder.hook
    ),
    "a partial hook": lambda recorder, layer: layer.register_forward_hook(functools.partial(recorder.hook)),
    "a decorated hook": lambda recorder, layer: layer.register_forward_hook(torch.no_grad()(recorder.hook)),
    "a forward": lambda recorder, layer: recorder.replace(layer.mlp),
    "a wrapped layer": lambda recorder, layer: recorder.wrap(layer),
    "a hook of all modules": lambda recorder, layer: torch.nn.modules.module.register_module_forward_pre_hook(
        lambda module, tensors: recorder.hook(module, tensors) if module is layer.mlp else None
    ),
}


@pytest.mark.parametrize(
    ("name", "late"),
    [
        *(("a hook of gradients", True), ("a wrapped layer", False), ("a forward of the class", True)),
    ],
)
def test_a_scripts_code_on_the_policy_gets_the_rows_of_a_batch(
    name: str,
    late: bool,
    folder: Path,
    pairs: Any,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each kind of code is found in a forward by `test_others_code.py`."""
    trained, recorded = [], []
    for home in (trl, guest):
        with monkeypatch.context() as patch:
            recorder = Recorder()
            trainer = trainer_of(home, folder, pairs, gradient_checkpointing=False)
            layer = trainer.model.model.layers[1]
            kind = type(layer.mlp)
            if name == "a forward of the class":
                own = kind.forward

                @functools.wraps(own)
                def forward(
                    module: Any, hidden: Tensor, *, own: Any = own, layer: Any = layer, to: Any = recorder
                ) -> Any:
                    if module is layer.mlp:
                        to.shapes.append(hidden.shape)
                    return own(module, hidden)

            class Place(TrainerCallback):
                placed: Any = None

                def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                    if state.global_step == 1:
                        self.place()

                def place(self, recorder: Any = recorder, layer: Any = layer, patch: Any = patch) -> None:
                    if name == "a forward of the class":
                        patch.setattr(type(layer.mlp), "forward", forward)
                    else:
                        self.placed = CODE[name](recorder, layer)

            place = Place()
            if late:
                trainer.add_callback(place)
            else:
                place.place()
            trainer.train()
            if hasattr(place.placed, "remove"):
                place.placed.remove()
        trained.append(trainer)
        recorded.append(recorder.shapes)
    assert recorded[1] == recorded[0]
    assert len(recorded[1]) >= STEPS - late
    assert {len(shape) for shape in recorded[1]} <= {2, 3}
    assert_same(trained[1], trained[0])
    assert caplog.text.count("TRL's own forward, with padding: hooks or forwards of tests") == 1


def test_packing_goes_on_when_a_hook_is_gone(folder: Path, pairs: Any) -> None:
    trainer = trainer_of(guest, folder, pairs, max_steps=4)

    class Toggle(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 1:
                self.hook = trainer.model.model.norm.register_forward_hook(lambda *_: None)

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            shapes.append(None)
            if state.global_step == 2:
                self.hook.remove()

    trainer.add_callback(Toggle())
    with recorded_lookups(trainer.model, torch.is_grad_enabled) as shapes:
        trainer.train()
    steps = [{shape[0] for shape in step} for step in split(shapes)]
    assert steps == [{1}, {8}, {1}, {1}]


def split(shapes: list[Any]) -> list[list[Any]]:
    """Split at each None."""
    parts: list[list[Any]] = [[]]
    for shape in shapes:
        if shape is None:
            parts.append([])
        else:
            parts[-1].append(shape)
    return parts[:-1]


def test_a_compiled_forward_is_that_of_trl(
    folder: Path, pairs: Any, caplog: pytest.LogCaptureFixture
) -> None:
    model = load(folder)
    model.compile(backend="eager")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    guest.DPOTrainer(model=model, args=arguments(), train_dataset=pairs, processing_class=tokenizer)
    assert caplog.text.count("with padding: a forward is compiled for rows of one shape") == 1


def test_a_reference_that_a_script_replaces_is_computed_by_trl(folder: Path, pairs: Any) -> None:
    trained = [trainer_of(home, folder, pairs, max_steps=2) for home in (trl, guest)]
    for trainer in trained:
        add_fused_lm_head(reference := load(folder))
        trainer.ref_model = trainer.accelerator.prepare_model(reference, evaluation_mode=True)
        torch.nn.init.normal_(trainer.ref_model.lm_head.weight, generator=torch.Generator().manual_seed(1))
        trainer.train()
    assert_same(trained[1], trained[0])


def test_fsdp_1_is_computed_by_trl(folder: Path) -> None:
    """It runs on accelerators only."""
    trainer = SimpleNamespace(
        args=SimpleNamespace(torch_compile=False, neftune_noise_alpha=None),
        aux_loss_enabled=False,
        is_fsdp_enabled=True,
        accelerator=SimpleNamespace(is_fsdp2=False),
    )
    assert "FSDP 1" in why_padded([load(folder)], [], trainer)
    trainer.accelerator.is_fsdp2 = True
    assert not why_padded([load(folder)], [], trainer)


def test_the_loss_of_routers_is_computed_by_trl(
    folder: Path, pairs: Any, caplog: pytest.LogCaptureFixture
) -> None:
    from tests.support.families import tiny_family

    tokenizer = AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(0)
    model = tiny_family("qwen3_moe", len(tokenizer))
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    trained = []
    for home in (trl, guest):
        args = arguments(router_aux_loss_coef=0.1, max_steps=2)
        own, reference = copy.deepcopy(model), copy.deepcopy(model)
        options = {"args": args, "train_dataset": pairs, "processing_class": tokenizer}
        trained.append(home.DPOTrainer(own, ref_model=reference, **options))
        trained[-1].train()
    assert_same(trained[1], trained[0], exact=0, weights=0)
    assert "aux_loss" in rows_of(trained[1])[0]
    assert caplog.text.count("with padding: the loss of routers") == 1


def test_afterwards_a_model_is_as_after_trl(folder: Path, pairs: Any, tmp_path: Path) -> None:
    threads = threading.active_count()
    trainer = trainer_of(guest, folder, pairs)
    trainer.train()
    model = trainer.model
    trainer.save_model("saved")
    written = (tmp_path / "saved" / "config.json").read_text()
    assert "dpo_dist" not in written
    assert json.loads(written).keys() == json.loads((folder / "config.json").read_text()).keys()
    fresh = load(tmp_path / "saved")
    ids = torch.tensor([[5, 6, 7]])
    options = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(model.generate(ids, **options), fresh.generate(ids, **options))
    assert model.config._attn_implementation == fresh.config._attn_implementation
    torch.testing.assert_close(model(ids).logits, fresh(ids).logits, rtol=0, atol=0)
    assert threading.active_count() <= threads + 1


def test_another_trainer_on_the_same_model_is_not_packed(folder: Path, pairs: Any) -> None:
    texts = Dataset.from_list([{"text": f"number {number}"} for number in range(4)])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    trainer = trainer_of(guest, folder, pairs, max_steps=1)
    trainer.train()
    trained = []
    for model in (trainer.model, copy.deepcopy(trainer.model)):
        options = {"max_steps": 2, "report_to": "none", "logging_steps": 1, "bf16": False, "use_cpu": True}
        args = trl.SFTConfig("sft", save_strategy="no", **options)
        other = trl.SFTTrainer(model, args=args, train_dataset=texts, processing_class=tokenizer)
        other.train()
        trained.append([row["loss"] for row in other.state.log_history if "loss" in row])
    assert trained[0] == trained[1]
    del trainer.ref_model
    again = guest.DPOTrainer(
        model=trainer.model, args=arguments(max_steps=1), train_dataset=pairs, processing_class=tokenizer
    )
    again.train()
    assert again.state.log_history[0]["loss"] > 0


def test_a_trainer_of_trl_that_another_thread_makes_is_trls(folder: Path, pairs: Any) -> None:
    made = []

    class Make(TrainerCallback):
        def on_init_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            thread = threading.Thread(target=lambda: made.append(trainer_of(trl, folder, pairs)))
            thread.start()
            thread.join()

    trainer_of(guest, folder, pairs, callbacks=[Make()])
    model = load(folder)
    with pytest.raises(ValueError, match="cannot be the same object"):
        guest.DPOTrainer(model, model, args=arguments(), train_dataset=pairs)
    made.append(trainer_of(trl, folder, pairs))
    assert len(made) == 2
    for trainer in made:
        assert type(trainer) is trl.DPOTrainer
        for model in (trainer.model, trainer.ref_model):
            assert model.forward.__func__.__code__.co_filename == trl.trainer.utils.__file__


def test_what_of_trl_is_relied_on() -> None:
    for kind in (trl.DPOTrainer, trl.KTOTrainer):
        source = inspect.getsource(kind)
        begins = [
            "self.aux_loss_enabled = ",
            "add_fused_lm_head(",
            "add_fused_lm_head(self.ref_model)",
            "accelerator.prepare_model(",
            "self._precompute_ref_logps(",
        ]
        places = [source.index(begin) for begin in begins]
        assert places == sorted(places)
        assert [*inspect.signature(kind.compute_ref_log_probs).parameters] == ["self", "model", "inputs"]
        assert 'adapter_name="ref" if "ref"' in source
        assert source.count("fused_lm_head=True") >= 4
    assert issubclass(guest.DPOTrainer, trl.DPOTrainer)
    assert trainers.DPOTrainer is guest.DPOTrainer
    assert older_names.DPOConfig is guest.DPOConfig


def test_a_scorer_s_own_prompt_is_refused_by_name(folder: Path, pairs: Any) -> None:
    data = pairs.add_column("reference_prompt", ["the sea"] * len(pairs))
    with pytest.raises(ValueError, match="read no reference_prompt"):
        trainer_of(guest, folder, data)
