"""The words that an error gives to a program beside its sentence."""

import ast
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import dpo_dist
from dpo_dist.config.keys import all_keys
from dpo_dist.foundation.errors import DpoDistError
from dpo_dist.foundation.remedies import InFile, Remedy, Typed, joined
from tests.unit.config.support import error_of

TYPED = ["reference.path=./modle", "model.path=./modle", "data.train=[{path: trian.jsonl, format: sharegpt}]"]
TYPED += ["data.eval=held_out.jsonl"]
# A remedy, where the error is; the words to write and to remove.
# fmt: off
REMEDIES = [
    (Remedy.to_write("optim.lr=5e-6"), Typed("--learning_rate", "5e-6"), ["optim.lr=5e-6"],
     ["--learning_rate", "5e-6"]),
    (Remedy.to_write_one_of(["loss.terms=[{kind: sft}]", "loss=sft"]), Typed("loss.terms={kind: sft}"),
     ["loss.terms=[{kind: sft}]"], []),
    (Remedy.to_rename("loss.betta", "loss.beta"), Typed("loss.betta=0.2"), ["loss.beta=0.2"],
     ["loss.betta=0.2"]),
    (Remedy.to_rename("loss.betta", "loss.beta"), InFile("loss.betta", "run.yaml"), [], []),
    (Remedy.to_rename("--confg-dir", "--config-dir"), Typed("--confg-dir", "x"), ["--config-dir", "x"],
     ["--confg-dir", "x"]),
    (Remedy("", ("loss.options.alpha=0.3", "loss=odpo")), Typed("alpha=0.3"),
     ["loss.options.alpha=0.3", "loss=odpo"], ["alpha=0.3", "loss.kind", "loss.terms"]),
    (Remedy.to_set("loss=kto"), "data.unpair, loss.kind", ["loss=kto"], ["loss.kind", "loss.terms"]),
    (Remedy.to_remove("loss.options.gamma"), "loss.options.gamma, loss.kind", [], ["loss.options.gamma"]),
    (Remedy("", drops=True), Typed("optim.lr=0"), [], ["optim.lr=0"]),
    (Remedy("", drops=True), "data.train[0].limit", [], []),
    (Remedy.to_rename("./modle", "./model"), "model.path", ["model.path=./model"], [TYPED[1]]),
    (Remedy.to_rename("./modle", "./model"), "./modle", ["reference.path=./model"], [TYPED[0]]),
    (Remedy.to_rename("mlflo", "mlflow"), Typed("tracking.to=[mlflo,mlflow]"),
     ["tracking.to=[mlflow,mlflow]"], []),
    (Remedy.to_rename("lr", "optim.lr"), Typed("keys=[lr,optim.lr]"), ["keys=[optim.lr,optim.lr]"], []),
    (Remedy.to_write("experiment=qwen3_0_6b"), Typed("+experiment=qwen3"), ["experiment=qwen3_0_6b"], []),
    (Remedy("", ("loss=kto",), remove=("loss.kind",)), "", ["loss=kto"], ["loss.kind", "loss.terms"]),
    *((Remedy.to_set(f"{group}=x"), "", [f"{group}=x"], [key]) for group, key in
      (("reference", "reference.mode"), ("parallelism", "parallelism.kind"), ("optim", "optim.kind"))),
    (Remedy.to_rename("trian.jsonl", "train.jsonl"), "trian.jsonl",
     [TYPED[2].replace("trian", "train")], [TYPED[2]]),
    (Remedy("", ("train", "loss=orpo")), Typed("orpo"), ["train", "loss=orpo"],
     ["orpo", "loss.kind", "loss.terms"]),
    (Remedy("raise the weight, or remove the source"), "data.train[0]", [], []),
]
# fmt: on


@pytest.mark.parametrize(("remedy", "where", "write", "remove"), REMEDIES)
def test_the_words_of_a_remedy(remedy: Remedy, where: str, write: list[str], remove: list[str]) -> None:
    assert remedy.words(where, TYPED) == {"write": write, "remove": remove}


def test_of_several_words_of_a_key_the_repaired_one_stays() -> None:
    """The last one wins, so that a repair of the first would be without effect."""
    typed = ["model.dtype=fp32", "model.dtype=float32", "loss=ipo"]
    found = Remedy.to_write("model.dtype=fp32").words(Typed("model.dtype=float32"), typed)
    assert found == {"write": ["model.dtype=fp32"], "remove": typed[:2]}


SAME_VALUES = [
    (Remedy.to_write("run.dir=512"), Typed("--output_dir", "512"), ["run.dir=512"], ["--output_dir 512"]),
    (Remedy.to_write("loss.beta=1"), Typed("loss.beta", "=", "1"), ["loss.beta=1"], ["loss.beta = 1"]),
    (Remedy.to_rename("--confg-dir", "--config-dir"), Typed("--confg-dir", "512"), ["--config-dir", "512"],
     ["--confg-dir 512"]),
    (Remedy("", drops=True), Typed("--seed", "512"), [], ["--seed 512"]),
    (Remedy.to_write("trainer.seed=7"), Typed("--seed", "7"), ["trainer.seed=7"], ["--seed", "7"]),
    (Remedy("say what it is"), Typed("--seed", "512"), [], []),
]  # fmt: skip


@pytest.mark.parametrize(("remedy", "where", "write", "remove"), SAME_VALUES)
def test_a_value_that_two_options_have_is_removed_with_its_own(
    remedy: Remedy, where: Typed, write: list[str], remove: list[str]
) -> None:
    typed = ["--config-dir", "512", *where.words, "optim.lr", "=", "1"]
    assert remedy.words(where, typed) == {"write": write, "remove": remove}


def test_a_word_that_is_shown_in_another_way_is_removed_by_its_key() -> None:
    found = Remedy("", drops=True).words(Typed('loss.beta="=0.2"'), ["loss.beta==0.2"])
    assert found == {"write": [], "remove": ["loss.beta"]}


RUN = "model.path=model model.dtype=fp32 tracking=off"
WRONG = [
    f"{RUN} data.train=[train.jsonl] loss.betta=0.2",
    f"{RUN} data.train=[train.jsonl] max_steps=3 optim.schedule=cosin optim.lr=0 loss=ipoo pairs.limit=3",
    f"{RUN} data.train=train.jsonl",
    f"{RUN} 'data.train=[{{path: train.jsonl, format: sharegpt}}]'",
    "--model_name_or_path model --dataset_name train.jsonl --learning_rate 5e-6 --report_to none --plot_loss",
    f"{RUN} data.train=[train.jsonl] loss=ipo loss.options.gamma=1",
    f"{RUN} data.train=[train.jsonl] data.unpair=true loss.kind=ipo model.attention=flash_attention_2",
    f"{RUN} data.train=[train.jsonl] reference=adapter trainer.eval_every=5",
    f"{RUN} data.train=[train.jsonl] loss.beta = 0.2",
    f"{RUN} data.train=[train.jsonl] --confg-dir . loss.beta==0.2",
]


def words_of(typed: str, verb: str = "train") -> dict[str, Any]:
    remedy: dict[str, Any] = error_of(typed, verb=verb, run=[]).as_dict(shlex.split(typed))["remedy"]
    return remedy


@pytest.mark.parametrize("typed", WRONG)
def test_nothing_is_decided_by_the_programs_own_english(typed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right, init = words_of(typed), DpoDistError.__init__

    def without_english(self: DpoDistError, message: str, **parts: Any) -> None:
        init(self, f"x{hash(message)}", **parts)
        self.advice = Remedy("x", *list(vars(self.advice).values())[1:])
        self.expected = "x"

    monkeypatch.setattr(DpoDistError, "__init__", without_english)
    found = words_of(typed)
    assert (found["write"], found["remove"]) == (right["write"], right["remove"])


@pytest.mark.parametrize(
    "typed",
    [
        "'data.train=[{path: a.jsonl, images: ./img}]'",
        "data.train=[a.jsonl] 'data.eval=[{path: b, weight: 2}]'",
    ],
)
def test_a_fault_of_a_field_never_removes_the_data(typed: str) -> None:
    found = words_of(f"model.path=model {typed}")
    assert found["remove"] == [], found


# fmt: off
JOINED = [
    ("--adam_beta2 0.95 --adam_beta1 0.9", [], []),
    ("--rpo_alpha 1.0 --loss_type ipo", [], []),
    ("sync_ref_model=true ref_model_sync_steps=64", ["reference=live", "loss.sync_reference.every=64"],
     ["sync_ref_model=true", "reference.mode", "ref_model_sync_steps=64"]),
    ("--early_stopping_patience 3 --eval_steps 50",
     ["trainer.patience=3", "trainer.keep_best=eval_loss", "trainer.eval_every=50"],
     ["--early_stopping_patience", "3", "--eval_steps", "50"]),
]
# fmt: on


@pytest.mark.parametrize(("typed", "write", "remove"), JOINED)
def test_two_mistakes_never_write_one_value_twice(typed: str, write: list[str], remove: list[str]) -> None:
    found = words_of(f"{RUN} data.train=[train.jsonl] {typed}")
    assert (found["write"], found["remove"]) == (write, remove)


def test_one_remedy_twice_is_the_remedy_and_what_another_only_removes_is_removed() -> None:
    written, removed = {"write": ["a=1"], "remove": ["b=2"]}, {"write": [], "remove": ["c=3"]}
    assert joined([written, written]) == written
    assert joined([written, removed]) == {"write": ["a=1"], "remove": ["b=2", "c=3"]}


WRITTEN = [
    ("--fp16 false", []),
    ("--use_liger_kernel false", []),
    ("optim.lr= 1e-6", ["optim.lr=1e-6"]),
    ("--loss.betta 0.2", ["loss.beta=0.2"]),
    ("data.trian=a.jsonl", ["data.train=[a.jsonl]"]),
    ("loss=[dpo,sft]", ["loss.terms=[{kind: sigmoid}, {kind: sft}]"]),
    ("'loss={betta: 1}' loss.kind=ipo", ["loss={beta: 1}"]),
    ("'model.adapter={rank: 8, alpha: 16}'", ["model.adapter={r: 8, alpha: 16}"]),
    ("export.dtype=bfloat16", ["export.dtype=bf16"]),
    ("reference=live 'model.adapter={r: 8}' loss.sync_reference.every=5", []),
    ("loss.gamma=1", ["loss.options.gamma=1", "loss=simpo"]),
    ("loss=sigmoid_sft loss.gamma=1", []),
    ("model.adapter={r=8}", ["model.adapter={r: 8}"]),
    ("data.eval=[{path=a.jsonl,split=test}]", ["data.eval=[{path: a.jsonl,split: test}]"]),
    ("data.eval=[a.jsonl", ["data.eval=[a.jsonl]"]),
    ("data.eval=[{path: a=b/c.jsonl", []),
    ("data.eval=[{path=https://h/f.jsonl?rev=main}]", []),
    ("./my.yml", ["my.yaml"]),
    ("-check", ["--check"]),
    ("my.yml", ["my.yaml"]),
    ("mine.toml.yaml", []),
    ("data.max_length=1,024", ["data.max_length=1024"]),
    ("data.eval=5%", ["data.eval_share=0.05"]),
    ("trainer.deterministic=yes", ["trainer.deterministic=true"]),
    ("optim.kind=muon parallelism.kind=zero3", ["parallelism=zero2"]),
    ("--bf16 my.yaml", []),
]


@pytest.mark.parametrize(("typed", "write"), WRITTEN, ids=[row[0] for row in WRITTEN])
def test_the_words_that_are_written(
    typed: str, write: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.yaml").write_text("trainer: {seed: 1}")
    found = words_of(f"{RUN} data.train=[train.jsonl] {typed}")
    assert found["write"] == write
    assert "my.yaml" not in found["remove"]
    assert not any(word.startswith("model.path") for word in found["remove"])


@pytest.mark.parametrize(
    ("typed", "remove"),
    [
        ("tracking=tensorboard", ["tracking"]),
        ("'loss={betta: 1}' loss.kind=ipo", ["loss={betta: 1}"]),
        ("reference=live 'model.adapter={r: 8}' loss.sync_reference.every=5", ["loss.sync_reference.every"]),
    ],
)
def test_the_words_that_are_removed(typed: str, remove: list[str]) -> None:
    assert words_of(f"{RUN} data.train=[train.jsonl] {typed}")["remove"] == remove


def test_the_branch_of_a_page_is_kept() -> None:
    page = "https://huggingface.co/org/name/tree/dev"
    found = words_of(f"model.path={page} data.train=[train.jsonl]")
    assert found["write"] == ["model.path=org/name", "model.revision=dev"]
    assert "revision: dev" in words_of(f"{RUN} data.train=[{page}]")["text"]


# Words that stand in a sentence only, and why no program may write them.
FOR_PEOPLE = {
    "model.images=null": "the records with images would be dropped",
    "data.untrained=[]": "repairs responses of one turn only",
    "model.trust_remote_code=true": "the code is read first",
    "model.dtype=fp32": "repairs no broken weights",
    "model.quantization=nf4": "for the original model, whose path is not known",
    "model.gradient_checkpointing=full": "may not save enough memory",
    "parallelism=zero3_offload": "may not save enough memory",
    "reference.offload=cpu": "may not save enough memory",
    "export.check=false": "the weights stay as they are",
    "optim.kind=adamw": "the checkpoint stays as it is",
    "pairs.method=samples": "a verb that makes other pairs, before this one",
    "pairs.method=delta": "an aside",
    "sweep.parallel=1": "an aside",
}


def sentences() -> Iterator[str]:
    """The remedies of the package that are strings, with {} for each value in them: they have no words."""
    for file in Path(dpo_dist.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            found: list[ast.expr] = []
            if isinstance(node, ast.Call):
                found += [given.value for given in node.keywords if given.arg == "remedy"]
                found += node.args[2:3] if ast.unparse(node.func) == "Rule" else []
            elif isinstance(node, ast.Assign) and "remedy" in ast.unparse(node.targets[0]).lower():
                found.append(node.value)
            for text in found:
                parts = text.values if isinstance(text, ast.JoinedStr) else [text]
                yield "".join(
                    str(part.value) if isinstance(part, ast.Constant) else "{}"
                    for part in parts
                    if isinstance(part, ast.Constant | ast.FormattedValue)
                )


def test_a_remedy_with_a_key_and_its_value_gives_them_as_words_too() -> None:
    """Other values are placeholders, such as FILE and [MODEL]. The `words` of a script are no command's."""
    keys = [*all_keys(), *{key.partition(".")[0] for key in all_keys()}, "{}"]
    key = "|".join(map(re.escape, keys))
    word = re.compile(rf"(?<![\w.])(?<!words=\[')(?:{key})=(?:[a-z0-9_]+|\[\])(?=[\s;,']|$)")
    assert {found for text in sentences() for found in word.findall(text)} == FOR_PEOPLE.keys()
