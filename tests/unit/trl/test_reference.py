"""The reference's log-probs are asked once for a response, and never those of another reference."""

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import trl
from peft import LoraConfig
from transformers import AutoModelForCausalLM, TrainerCallback

from dpo_dist import api
from dpo_dist import trl as guest
from dpo_dist.model.library_internals import adapters_in_use
from dpo_dist.reference.store import read_fingerprints
from dpo_dist.trl.reference import KeptReference
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
    "another loss": {"loss_type": ["ipo"], "ld_alpha": 0.5, "beta": 0.5},
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


KEYS = np.array([[1, 2]], dtype=np.uint64)


def is_answered(model: Any) -> bool:
    """Whether the store has an entry of this reference, which has one afterwards."""
    kept = KeptReference(STORE, "tiny", frozenset(), lambda _: None)
    found = kept.find(model, KEYS)
    kept.keep(KEYS, [np.ones(3, dtype=np.float32)])
    kept.flush()
    return found is not None


def edited(model: Any) -> Any:
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] += 1e-3
    return model


def turned(model: Any) -> Any:
    """A model with other frequencies of positions, which no file of weights has."""
    model.model.rotary_emb.inv_freq.mul_(1.5)
    return model


def test_other_texts_are_asked(folder: Path, pairs: Any) -> None:
    shouted = pairs.map(lambda row: {"chosen": [{**row["chosen"][0], "content": "IT IS 1."}]})
    for data in (pairs, shouted):
        _, forwards = asked(folder, data, max_steps=2)
        assert forwards == EPOCH
    assert len(fingerprints()) == 1


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


REFERENCES: dict[str, Callable[[Path], Any]] = {
    "plain": lambda folder: load(folder / "reference"),
    "other weights": load,
    "an edited weight": lambda folder: edited(load(folder / "reference")),
    "other positions": lambda folder: turned(load(folder / "reference")),
    "another configuration": lambda folder: AutoModelForCausalLM.from_pretrained(
        folder / "reference", rms_norm_eps=1e-2
    ),
    "in bf16": lambda folder: AutoModelForCausalLM.from_pretrained(
        folder / "reference", dtype=torch.bfloat16
    ),
    "an adapter": lambda folder: adapted(folder, lora_alpha=8),
    **NUMBERS,
}


def test_each_reference_and_precision_has_entries_of_its_own(folder: Path) -> None:
    for is_known in (False, True):
        for name, reference in REFERENCES.items():
            assert is_answered(reference(folder)) is is_known, name
        with torch.autocast("cpu", torch.bfloat16):
            assert is_answered(load(folder / "reference")) is is_known, "as a trainer with bf16 asks"
    assert len(fingerprints()) == len(REFERENCES) + 1


@pytest.mark.parametrize("name", ["a scaling", "an epsilon"])
def test_a_number_that_no_weight_has_is_that_of_trl(name: str, folder: Path, pairs: Any) -> None:
    asked(
        folder,
        pairs,
        max_steps=2,
        ref_model=REFERENCES["an adapter" if name == "a scaling" else "plain"](folder),
    )
    case = {"max_steps": 2, "learning_rate": 0.01}
    ours, forwards = asked(folder, pairs, ref_model=NUMBERS[name](folder), **case)
    assert forwards == EPOCH
    theirs = trainer_of(trl, folder, pairs, ref_model=NUMBERS[name](folder), **case)
    theirs.train()
    assert_same(ours, theirs)


def swap_rows(model: Any) -> None:
    """An edit after which sums over bits are what they were."""
    weight = next(model.parameters()).data
    weight[[7, 8]] = weight[[8, 7]]
    weight[:, [3, 4]] = weight[:, [4, 3]]


EDITS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "a product": (lambda model: next(model.parameters()).data.mul_(1.5), "its weights have changed"),
    "weights that change places": (swap_rows, "its weights have changed"),
    "frequencies of positions": (turned, "its weights have changed"),
    "layers that change places": (
        lambda model: model.model.layers.insert(0, model.model.layers.pop(1)),
        "its weights have changed",
    ),
    "a number": (
        lambda model: setattr(model.model.layers[0].self_attn, "scaling", 0.9),
        "numbers on its layers have changed",
    ),
    "a hook": (
        lambda model: model.model.layers[0].register_forward_hook(lambda _module, _inputs, hidden: hidden),
        "its layers call tests, which is no package with a version",
    ),
}


@pytest.mark.parametrize("name", EDITS)
def test_after_an_edit_no_entry_is_used_or_kept(name: str, folder: Path) -> None:
    edit, reason = EDITS[name]
    said: list[str] = []
    model = load(folder)
    assert not is_answered(model)
    kept = KeptReference(STORE, "tiny", frozenset(), said.append)
    assert kept.find(model, KEYS) is not None
    edit(model)
    assert kept.find(model, KEYS) is None
    assert said[0].endswith(f"from now on, and not kept: {reason}")
    kept.keep(KEYS + 1, [np.ones(3, dtype=np.float32)])
    kept.flush()
    assert [len(entries) for _, entries in api.open_stores(STORE)] == [1]


def test_what_the_store_answers_first_is_compared_with_the_reference(
    folder: Path, pairs: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What no key has, as a function of a model's file that a script replaces."""
    case = {"max_steps": 2, "learning_rate": 0.01}
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


def test_a_reference_that_a_scripts_code_changes_is_not_kept(
    folder: Path, pairs: Any, caplog: pytest.LogCaptureFixture
) -> None:
    def steer(layer: Any) -> None:
        own = layer.forward
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


def test_a_reference_that_is_edited_is_asked_from_then_on(
    folder: Path, pairs: Any, caplog: pytest.LogCaptureFixture
) -> None:
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
    assert caplog.text.count("from now on, and not kept: its weights have changed") == 1
    _, again = asked(folder, pairs, max_steps=2)
    assert again == 0, "what was asked before is kept"


def test_an_adapter_is_off_or_the_one_that_was_continued(
    folder: Path, pairs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, forwards = asked(folder, pairs, adapter="new", max_steps=2)
    assert forwards == EPOCH - 1, "the comparison is that of the policy"
    assert rows_of(first)[0]["rewards/margins"] == 0, "a new adapter begins as its reference, exactly"
    second, again = asked(folder, pairs, adapter="new", max_steps=4)
    assert again == 0
    assert abs(rows_of(second)[1]["rewards/margins"]) > 0, "the adapter that trains is not off"
    _, whole = asked(folder, pairs, ref_model=load(folder), max_steps=2)
    assert whole == 0, "a base without its adapter is the reference of a run that trains all weights"
    _, continued = asked(folder, pairs, adapter="continued", max_steps=2)
    assert continued == EPOCH - 1, "its reference is another one"

    def larger() -> LoraConfig:
        return LoraConfig(r=4, lora_alpha=32, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")

    monkeypatch.setattr("tests.unit.trl.test_trainers.lora", larger)
    ours, scaled_forwards = asked(folder, pairs, adapter="continued", max_steps=2)
    assert scaled_forwards == EPOCH - 1, "another scaling is another reference"
    assert rows_of(ours)[0]["rewards/margins"] == pytest.approx(0, abs=1e-5)
    _, continued_again = asked(folder, pairs, adapter="continued", max_steps=2)
    assert continued_again == 0


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
    monkeypatch.setattr("dpo_dist.reference.store.staged_file", refuse)
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
