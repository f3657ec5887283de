"""The reference's log-probs are asked once for a response, and never those of another reference."""

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from peft import LoraConfig
from transformers import AutoModelForCausalLM, TrainerCallback

from dpo_dist import api
from dpo_dist import trl as guest
from dpo_dist.model.library_internals import adapters_in_use
from dpo_dist.reference.store import read_fingerprints
from tests.support.lookups import recorded_lookups
from tests.unit.trl.test_trainers import assert_same, load, rows_of, trainer_of

pytestmark = pytest.mark.slow

STORE = Path("output/reference")
EPOCH = 3
"""The forwards of an epoch: two batches, and the comparison of the first one with TRL's."""


def asked(folder: Path, data: Any, **case: Any) -> tuple[Any, int]:
    """A trainer of ours that has trained, and how many packed forwards its reference has computed."""
    trainer = trainer_of(guest, folder, data, **case)
    with recorded_reference(trainer) as shapes:
        trainer.train()
    return trainer, sum(rows == 1 for rows, _ in shapes)


@contextmanager
def recorded_reference(trainer: Any) -> Iterator[list[torch.Size]]:
    """Record the rows and tokens of the reference's forwards inside the block."""
    if trainer.ref_model is not None:
        with recorded_lookups(trainer.ref_model) as shapes:
            yield shapes
        return
    model = getattr(trainer.model, "get_base_model", lambda: trainer.model)()
    with recorded_lookups(model, lambda: adapters_in_use(model) in (frozenset(), {"ref"})) as shapes:
        yield shapes


def fingerprints() -> list[Any]:
    return read_fingerprints(STORE)


REUSES: dict[str, dict[str, Any]] = {
    "the same run": {},
    "another beta": {"beta": 0.5},
    "another loss": {"loss_type": ["ipo"], "ld_alpha": 0.5},
    "another order, other batches": {"seed": 5, "per_device_train_batch_size": 2, "max_steps": 4},
    "precomputed": {"precompute_ref_log_probs": True},
}


def test_a_later_run_asks_no_reference(folder: Path, pairs: Any) -> None:
    _, first = asked(folder, pairs, max_steps=2)
    assert first == EPOCH
    shards = sorted(STORE.rglob("*.safetensors"))
    assert len(shards) == 1, "not a file for each batch"
    for name, case in REUSES.items():
        ours, later = asked(folder, pairs, **case)
        assert later == 0, name
        assert sorted(STORE.rglob("*.safetensors")) == shards, name
        theirs = trainer_of(trl, folder, pairs, **case)
        theirs.train()
        assert_same(ours, theirs)


def edited(model: Any) -> Any:
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] += 1e-3
    return model


def turned(model: Any) -> Any:
    """A model with other frequencies of positions, which no file of weights has."""
    model.model.rotary_emb.inv_freq.mul_(1.5)
    return model


def test_another_reference_or_precision_has_entries_of_its_own(folder: Path, pairs: Any) -> None:
    changes: list[dict[str, Any]] = [
        {},
        {"ref_model": load(folder)},
        {"ref_model": edited(load(folder / "reference"))},
        {"ref_model": turned(load(folder / "reference"))},
        {"ref_model": AutoModelForCausalLM.from_pretrained(folder / "reference", rms_norm_eps=1e-2)},
        {"ref_model": AutoModelForCausalLM.from_pretrained(folder / "reference", dtype=torch.bfloat16)},
        {"bf16": True},
    ]
    for number, change in enumerate(changes, start=1):
        _, forwards = asked(folder, pairs, max_steps=2, **change)
        assert forwards == EPOCH, change
        assert len(fingerprints()) == number, "each is another reference, or has other numerics"
    # Other token ids of the same texts.
    shouted = pairs.map(lambda row: {"chosen": [{**row["chosen"][0], "content": "IT IS 1."}]})
    _, forwards = asked(folder, shouted, max_steps=2)
    assert forwards == EPOCH
    assert len(fingerprints()) == len(changes)


def adapted(folder: Path, **options: Any) -> Any:
    model = load(folder / "reference")
    torch.manual_seed(3)
    model.add_adapter(LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False, **options))
    return model


def set_numbers(folder: Path, name: str, value: Any) -> Any:
    """A reference on one layer of which a script has set an attribute."""
    model = load(folder / "reference")
    *path, last = name.split(".")
    setattr(model.get_submodule(".".join(path)), last, value)
    return model


def scaled(folder: Path) -> Any:
    model = adapted(folder)
    model.model.layers[0].self_attn.q_proj.scaling["default"] = 9.0
    return model


NUMBERS: dict[str, Callable[[Path], Any]] = {
    "lora_alpha": lambda folder: adapted(folder, lora_alpha=64),
    "use_rslora": lambda folder: adapted(folder, use_rslora=True),
    "alpha_pattern": lambda folder: adapted(folder, alpha_pattern={"q_proj": 32}),
    "a scaling": scaled,
    "attention": lambda folder: set_numbers(folder, "model.layers.1.self_attn.scaling", 0.9),
    "a tensor": lambda folder: set_numbers(folder, "model.layers.1.self_attn.scaling", torch.tensor(0.8)),
    "an epsilon": lambda folder: set_numbers(folder, "model.norm.variance_epsilon", 0.5),
}


def test_a_number_that_no_weight_has_makes_another_reference(folder: Path, pairs: Any) -> None:
    for plain in (adapted(folder, lora_alpha=8), load(folder / "reference")):
        asked(folder, pairs, max_steps=2, ref_model=plain)
    case = {"max_steps": 2, "learning_rate": 0.01}
    for name, reference in NUMBERS.items():
        ours, forwards = asked(folder, pairs, ref_model=reference(folder), **case)
        assert forwards == EPOCH, name
        theirs = trainer_of(trl, folder, pairs, ref_model=reference(folder), **case)
        theirs.train()
        assert_same(ours, theirs)
    for name, reference in NUMBERS.items():
        _, again = asked(folder, pairs, ref_model=reference(folder), **case)
        assert again == 0, name


def test_the_scaling_of_a_continued_adapter_makes_another_reference(
    folder: Path, pairs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = {"adapter": "continued", "max_steps": 2}
    asked(folder, pairs, **case)

    def larger() -> LoraConfig:
        return LoraConfig(r=4, lora_alpha=32, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")

    monkeypatch.setattr("tests.unit.trl.test_trainers.lora", larger)
    ours, forwards = asked(folder, pairs, **case)
    assert forwards == EPOCH - 1
    assert rows_of(ours)[0]["rewards/margins"] == pytest.approx(0, abs=1e-5)
    _, again = asked(folder, pairs, **case)
    assert again == 0


def test_a_number_that_a_callback_sets_on_a_layer_is_followed(
    folder: Path, pairs: Any, caplog: pytest.LogCaptureFixture
) -> None:
    class Edit(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.reference.model.layers[0].self_attn.scaling = 0.9

    trained = []
    for home in (trl, guest):
        edit = Edit()
        trained.append(trainer_of(home, folder, pairs, max_steps=4, learning_rate=0.01, callbacks=[edit]))
        edit.reference = trained[-1].ref_model
        trained[-1].train()
    assert_same(trained[1], trained[0])
    assert caplog.text.count("and not kept: numbers on its layers have changed") == 1


def test_what_the_store_answers_first_is_compared_with_the_reference(
    folder: Path, pairs: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What no key has, as a function of a model's file that a script replaces."""
    case = {"max_steps": 4, "learning_rate": 0.01}
    trainer_of(guest, folder, pairs, **case).train()
    again = trainer_of(guest, folder, pairs, **case)
    with recorded_reference(again) as shapes:
        again.train()
    assert [rows for rows, _ in shapes] == [8], "asked once, by TRL's own forward"
    assert "not kept" not in caplog.text
    shards = {path: path.read_bytes() for path in STORE.rglob("*.safetensors")}
    silu = torch.nn.functional.silu
    monkeypatch.setattr(torch.nn.functional, "silu", lambda hidden, inplace=False: 1.5 * silu(hidden))
    trained = [trainer_of(home, folder, pairs, **case) for home in (trl, guest)]
    for trainer in trained:
        trainer.train()
    assert_same(trained[1], trained[0])
    said = "and not kept: what the store has is not of this reference: log-probs differ by"
    assert caplog.text.count(said) == 1
    assert {path: path.read_bytes() for path in STORE.rglob("*.safetensors")} == shards


def test_a_synced_reference_is_not_kept(folder: Path, pairs: Any, caplog: pytest.LogCaptureFixture) -> None:
    _, forwards = asked(folder, pairs, sync_ref_model=True, ref_model_sync_steps=1, max_steps=4)
    assert forwards == EPOCH + 2
    assert not STORE.exists()
    assert "the reference's log-probs are computed in each step" in caplog.text


@pytest.mark.parametrize("place", ["a hook", "a forward"])
def test_a_reference_that_a_scripts_code_changes_is_not_kept(
    place: str, folder: Path, pairs: Any, caplog: pytest.LogCaptureFixture
) -> None:
    def steer(layer: Any) -> None:
        own = layer.forward
        if place == "a hook":
            layer.register_forward_hook(lambda _module, _inputs, hidden: hidden + 0.1)
        else:
            layer.forward = lambda *arguments, **options: own(*arguments, **options) + 0.1

    trained = []
    for home in (trl, guest):
        reference = load(folder / "reference")
        steer(reference.model.layers[0])
        trained.append(trainer_of(home, folder, pairs, ref_model=reference))
        trained[-1].train()
    assert_same(trained[1], trained[0])
    assert caplog.text.count("and not kept: its layers call tests, which is no package with a version") == 1
    assert not STORE.exists()


def test_a_reference_that_is_edited_is_asked_from_then_on(folder: Path, pairs: Any) -> None:
    class Edit(TrainerCallback):
        def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 4:
                # Not seen by the version that torch keeps of a tensor.
                next(self.reference.parameters()).data.mul_(1.01)

    trained = []
    for home in (trl, guest):
        edit = Edit()
        trained.append(trainer_of(home, folder, pairs, max_steps=6, callbacks=[edit]))
        edit.reference = trained[-1].ref_model
        trained[-1].train()
    assert_same(trained[1], trained[0])
    rows = [row["logps/chosen"] for row in rows_of(trained[1])[:-1]]
    assert len(rows) == 6
    _, again = asked(folder, pairs, max_steps=2)
    assert again == 0, "what was asked before is kept"


def test_an_adapter_is_off_or_the_one_that_was_continued(folder: Path, pairs: Any) -> None:
    first, forwards = asked(folder, pairs, adapter="new", max_steps=2)
    assert forwards == EPOCH - 1, "the comparison is that of the policy"
    assert rows_of(first)[0]["rewards/margins"] == 0, "a new adapter begins as its reference, exactly"
    second, again = asked(folder, pairs, adapter="new", max_steps=4)
    assert again == 0
    _, continued = asked(folder, pairs, adapter="continued", max_steps=2)
    assert continued == EPOCH - 1, "its reference is another one"
    _, continued_again = asked(folder, pairs, adapter="continued", max_steps=2)
    assert continued_again == 0
    assert abs(rows_of(second)[1]["rewards/margins"]) > 0, "the adapter that trains is not off"
    _, whole = asked(folder, pairs, ref_model=load(folder), max_steps=2)
    assert whole == 0, "a base without its adapter is the reference of a run that trains all weights"


def test_a_policy_before_training_is_the_reference(folder: Path, pairs: Any) -> None:
    asked(folder, pairs, precompute_ref_log_probs=True, ref_model=None, max_steps=2)
    assert len(api.open_stores(STORE)[0][1]) == 2 * len(pairs)
    _, forwards = asked(folder, pairs, ref_model=load(folder), max_steps=2)
    assert forwards == 0


def test_entries_are_in_the_store_of_our_own_runs(folder: Path, pairs: Any) -> None:
    asked(folder, pairs, max_steps=2)
    (store,) = api.open_stores(STORE)
    fingerprint, entries = store
    assert len(entries) == 2 * len(pairs)
    assert fingerprint.label == str(folder / "reference")
    assert fingerprint.profile["head"] == f"trl {trl.__version__}", "whose digits are not those of our head"


def test_a_store_that_cannot_be_written_does_not_end_a_run(
    folder: Path, pairs: Any, caplog: pytest.LogCaptureFixture
) -> None:
    STORE.parent.mkdir()
    STORE.write_text("")
    trainer, forwards = asked(folder, pairs, max_steps=2)
    assert forwards == EPOCH
    assert "from now on, and not kept: ReferenceModelError" in caplog.text
    theirs = trainer_of(trl, folder, pairs, max_steps=2)
    theirs.train()
    assert_same(trainer, theirs)


def test_a_store_that_is_read_only_is_read(
    folder: Path, pairs: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked(folder, pairs.select(range(4)), max_steps=1)

    def refuse(*_: Any) -> None:
        raise PermissionError(errno.EACCES, "read-only")

    monkeypatch.setattr("os.access", lambda *_: False)  # as for another user; root may write anywhere
    monkeypatch.setattr("dpo_dist.reference.store.save_file", refuse)
    _, forwards = asked(folder, pairs.select(range(4)), max_steps=1)
    assert forwards == 0
    _, forwards = asked(folder, pairs, max_steps=4, seed=5)
    assert forwards == EPOCH, "what the store lacks is computed once"
    assert caplog.text.count("a shard of reference log-probs cannot be written") == 1


def test_a_run_that_is_interrupted_keeps_what_it_asked(folder: Path, pairs: Any) -> None:
    class Interrupt(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            raise KeyboardInterrupt

    trainer = trainer_of(guest, folder, pairs, callbacks=[Interrupt()])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert len(api.open_stores(STORE)[0][1]) == 8


def test_a_script_chooses_the_store(folder: Path, pairs: Any, tmp_path: Path) -> None:
    class Trainer(guest.DPOTrainer):  # type: ignore[misc]
        reference_store = tmp_path / "shared"

    trainer_of(guest, folder, pairs, trainer=Trainer, max_steps=1).train()
    assert [*(tmp_path / "shared").rglob("*.safetensors")]
    assert not STORE.exists()
