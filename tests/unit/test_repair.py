"""The words that an error's remedy gives to a program."""

import pytest

from dpo_dist.foundation.repair import repair_of

TYPED = ["model.path=./modle", "data.train=[{path: trian.jsonl, format: sharegpt}]"]
TYPED += ["data.eval=held_out.jsonl"]
# A remedy, where, got; the words to write and to remove.
# fmt: off
REMEDIES = [
    ("write optim.lr=5e-6", "command line: --learning_rate 5e-6", "", ["optim.lr=5e-6"],
     ["--learning_rate", "5e-6"]),
    ("write 'loss.terms=[{kind: sft}]' or loss=sft", "command line: loss.terms={kind: sft}", "",
     ["loss.terms=[{kind: sft}]"], []),
    ("did you mean loss.beta?", "command line: loss.betta=0.2", "", ["loss.beta=0.2"], ["loss.betta=0.2"]),
    ("did you mean loss.beta?", "loss.betta in run.yaml", "", ["loss.beta"], ["loss.betta"]),
    ("did you mean --config-dir?", "command line: --confg-dir x", "", ["--config-dir", "x"],
     ["--confg-dir", "x"]),
    ("write loss.options.alpha=0.3; this option needs loss=odpo or loss=beta_dpo", "command line: alpha=0.3",
     "", ["loss.options.alpha=0.3", "loss=odpo"], ["alpha=0.3", "loss.kind", "loss.terms"]),
    ("set model.adapter={r: 64, alpha: 128}, or choose reference=cached", "reference.mode", "adapter",
     ["model.adapter={r: 64, alpha: 128}"], []),
    ("set loss=kto or loss=apo_zero_unpaired, or remove data.unpair", "data.unpair, loss.kind", "true, ipo",
     ["loss=kto"], ["loss.kind", "loss.terms"]),
    ("remove loss.options.gamma, or choose a loss that uses it: simpo; loss=NAME replaces all options",
     "loss.options.gamma, loss.kind", "1, ipo", [], ["loss.options.gamma"]),
    ("set optim.lr to a number, > 0; remove it for the default, 5e-07", "command line: optim.lr=0", "0", [],
     ["optim.lr=0"]),
    ("set data.train[0].limit to a whole number; remove it for the default, null", "data.train[0].limit", "0",
     [], []),
    ("did you mean ./model?", "model.path", "./modle (there is no such folder)", ["model.path=./model"],
     [TYPED[0]]),
    ("did you mean train.jsonl?", "trian.jsonl", "", [TYPED[1].replace("trian", "train")], [TYPED[1]]),
    ("did you mean data.train[0].format=auto?", "data.train[0].format", "sharegpt",
     [TYPED[1].replace("sharegpt", "auto")], [TYPED[1]]),
    ("write this key inside an entry: 'data.train=[{path: a}]'", "command line: data.train.path=a", "",
     ["data.train=[{path: a}]"], ["data.train.path=a"]),
    ("write dpo-dist train loss=orpo", "command line: orpo", "", ["train", "loss=orpo"],
     ["orpo", "loss.kind", "loss.terms"]),
    ("not needed: every run writes report.html", "command line: --plot_loss", "", [], ["--plot_loss"]),
    ("not needed if false; else set model.quantization=nf4", "command line: load_in_4bit=true", "", [], []),
    ("write loss.beta=0.2: a decimal point, no comma", "command line: loss.beta=0,2", "",
     ["loss.beta=0.2"], []),
    ("leave run.dir out, which gives each configuration its own folder", "run.dir", "", [], ["run.dir"]),
    ("write 'data.train=[held_out.jsonl]'", "command line: data.train=held_out.jsonl", "",
     ["data.train=[held_out.jsonl]"], []),
    # What only the user knows is no word to type.
    ("set data.train=[pairs.jsonl], or choose a preset with data=...", "data.train", "", [], []),
    ("write loss=NAME: aot, bco", "command line: loss=[]", "", [], []),
    ("write dpo-dist export run.dir=RUN export.merge=true", "command line: merge", "", [], []),
    ("write data.chat_template=...", "command line: chat_template=1", "", [], []),
    ("set export.push_to=ORG/NAME", "export.confirm", "true", [], []),
    ("take loss.kind=ipo out of this sweep; in a command of its own remove loss.beta", "loss.kind=ipo", "",
     [], []),
    ("correct or remove these columns", "train.jsonl", "frage", [], []),
    ("raise the weight, or remove the source", "data.train[0]", "", [], []),
]
# fmt: on


@pytest.mark.parametrize(
    ("remedy", "where", "got", "write", "remove"), REMEDIES, ids=[row[0] for row in REMEDIES]
)
def test_the_words_of_a_remedy(
    remedy: str, where: str, got: str, write: list[str], remove: list[str]
) -> None:
    assert repair_of(remedy, where, got, TYPED) == {"write": write, "remove": remove}


def test_of_several_words_of_a_key_the_repaired_one_stays() -> None:
    """The last one wins, so that a repair of the first would be without effect."""
    typed = ["model.dtype=fp32", "model.dtype=float32", "loss=ipo"]
    where = "command line: model.dtype=float32"
    found = repair_of("did you mean model.dtype=fp32?", where, "float32", typed)
    assert found == {"write": ["model.dtype=fp32"], "remove": typed[:2]}


def test_a_preset_that_does_not_exist_goes_where_a_key_is_written() -> None:
    typed = ["model=folder", "loss.beta=0.2"]
    remedy = "a path is no preset: write model.path=folder or evaluation.model=folder"
    found = repair_of(remedy, "model", "folder", typed)
    assert found == {"write": ["model.path=folder"], "remove": typed[:1]}


def test_a_word_that_is_shown_in_another_way_is_removed_by_its_key() -> None:
    found = repair_of("remove it", 'command line: loss.beta="=0.2"', "=0.2", ["loss.beta==0.2"])
    assert found == {"write": [], "remove": ["loss.beta"]}
