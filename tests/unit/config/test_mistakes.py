"""Mistakes in a command, and options of other trainers, are one error with an answer to each."""

import re
import shlex
from pathlib import Path

import pytest

from dpo_dist.compat.other_trainers import other_trainers
from dpo_dist.config.command_line import split_words
from dpo_dist.config.keys import group_folders, preset_names, run_keys
from dpo_dist.config.losses import LossKind, LossTermConfig
from dpo_dist.config.rules import value_at
from dpo_dist.data.config import SourceConfig
from dpo_dist.foundation.errors import ConfigError
from dpo_dist.foundation.fields import choices
from tests.support.remedies import words_to_write
from tests.unit.config.support import RUN, configured, error_of

pytestmark = pytest.mark.slow

SECTIONS = "|".join(name for name in run_keys() if "." not in name)

# A command line as typed, and a part of the error.
MISTYPED = [
    # Keys: the nearest name, with the value that it takes.
    ("loss.betta=0.2", "did you mean loss.beta=0.2?"),
    ("loss.Beta=0.2", "did you mean loss.beta=0.2?"),
    ("los.beta=0.2", "did you mean loss.beta=0.2?"),
    ("beta=0.2", "did you mean loss.beta=0.2?"),
    ("+loss.betta=0.2", "did you mean loss.beta=0.2?"),
    ("optim.beta=[0.9,0.95]", "did you mean 'optim.betas=[0.9, 0.95]'?"),
    ("trainer.epoch=two", "did you mean trainer.epochs, a number, > 0 and <= 1e+09?"),
    ("max_lenght=5", "did you mean data.max_length=5?"),
    ("model.adaptor.r=8", "did you mean model.adapter.r=8?"),
    ("loss.aux_coefficient=0.01", "did you mean loss.router.aux_coefficient=0.01?"),
    ("prompts=3", "did you mean sampling.prompts=3?"),
    ("reference.modle=tiny", "did you mean reference.mode, one of auto, cached"),
    ("export.method=delta", "did you mean pairs.method=delta?"),
    ("sampling.judge.model=x", "did you mean sampling.endpoint.model=x?"),
    ("samp.endpoint.model=x", "did you mean sampling.endpoint.model=x?"),
    ("optim.foo=1", "the keys of optim are kind, sums, lr, "),
    ("foo=1", "the sections are run, model, "),
    ("loss=simpo loss.gamma=0.5", "did you mean loss.options.gamma=0.5? It is an option of simpo"),
    ("loss.alpha=0.3", "did you mean loss.options.alpha=0.3? It is an option of odpo, beta_dpo"),
    # Keys of the entries of lists.
    ("'data.train=[{path: b, limt: 5}]'", "did you mean limit?"),
    ("'data.train=[{limt: 5}]'", "there is no key 'data.train[0].limt'"),
    ("'data.train=[{limit: 5}]'", "write path into the entry: {path: ..., ...}"),
    ("data.train.path=a", "write it inside an entry: 'data.train=[{path: ...}]'"),
    ("data.eval.0.path=a", "write it inside an entry: 'data.eval=[{path: ...}]'"),
    ("data.train.wieght=2", "did you mean weight?"),
    ("data.train.weight=2", "write it inside an entry: 'data.train=[{weight: ...}]'"),
    # Values: what the key takes.
    ("trainer.epochs=two", "set trainer.epochs to a number, > 0 and <= 1e+09, or remove it"),
    ("trainer.max_steps=1k", "set trainer.max_steps to a whole number or null, >= 1"),
    ("trainer.max_steps=1000.5", "got:      1000.5"),
    ("trainer.seed=true", "got:      true"),
    ("trainer.seed=1e300", "a whole number, >= 0, <= 9,007,199,254,740,992"),
    ("trainer.micro_batch_tokens=100000000000000000000", "auto, or a whole number, >= 1"),
    ("optim.lr=5e6", "a number, > 0 and <= 1"),
    ("optim.lr=[1e-5]", "set optim.lr to a number"),
    ("optim.lr=1e-4,", "got:      '1e-4,'"),
    ("parallelism.timeout_seconds=0", "a whole number, >= 1 and <= 1e+07"),
    ("data.eval_share=20%", "got:      '20%'"),
    ("run.root=null", "set run.root to text"),
    ("run.dir=", "got:      ''"),
    ("run=3", "set run to a mapping with dir, name"),
    ("loss.router=0.01", "set loss.router to a mapping with aux_coefficient"),
    ("'data.train={}'", "set data.train to a list in brackets: [a,b]"),
    ("model.trust_remote_code=yes", "set model.trust_remote_code to true or false"),
    ("data.untrained=[foo]", "set data.untrained[0] to one of empty_thoughts, thoughts"),
    ("optim.betas=(0.9,0.95)", "set optim.betas[0] to a number"),
    ("optim.schedule=cosin", "did you mean optim.schedule=cosine?"),
    ("tracking.to=[wandb,mlflo]", "tracking.to[1] cannot have this value"),
    ("'loss.terms=[{kind: sfft}]'", "did you mean sft?"),
    ("'loss.options={1.5: 0.3}'", "sigmoid has no option '1.5'"),
    ("'data.cache=${run.rot}/x'", "command line: data.cache=${run.rot}/x"),
    ("model.path=https://huggingface.co/Qwen/Qwen3-0.6B", "did you mean Qwen/Qwen3-0.6B?"),
    ("model.path=hf.co/Qwen/Qwen3-0.6B/tree/main", "did you mean Qwen/Qwen3-0.6B?"),
    ("reference.path=hf.co/org/name/tree/v2", "did you mean org/name? Its branch v2"),
    ("data.train=[https://huggingface.co/datasets/org/name/]", "did you mean org/name?"),
    ("'data.eval=[{path: https://huggingface.co/datasets/org/n/blob/main/a.csv}]'", "did you mean org/n?"),
    ("data.train=[gs:/bucket/pairs.jsonl]", "did you mean gs://bucket/pairs.jsonl?"),
    ("data.eval=[https:host/pairs.jsonl]", "did you mean https://host/pairs.jsonl?"),
    ("loss=simpo reference.path=m", "(if a file sets it, write reference.path=null), or choose a loss with"),
    ("data.eval_share=0.1 trainer.eval_every=1 trainer.keep_best=eval_lss", "did you mean eval_loss? "),
    # Presets.
    ("loss=ipoo", "did you mean loss=ipo?"),
    ("loss=dpo", "did you mean loss=sigmoid?"),
    ("loss=null", "no loss named 'null'"),
    ("loss=[sigmoid,sft]", "write loss=NAME; loss.terms has the kinds of a sum"),
    ("reference=[]", "write reference=NAME"),
    ("model=Qwen/Qwen2.5-7B", "did you mean model.path=Qwen/Qwen2.5-7B?"),
    ("data=hard.jsonl", "did you mean data.train=hard.jsonl?"),
    ("parallelism=zero4", "did you mean parallelism=zero3?"),
    ("tracking=none", "did you mean tracking=off?"),
    ("reference=off", "did you mean reference=none?"),
    ("+experiment=qwen7", "did you mean +experiment=qwen7b?"),
    # Forms.
    ("loss.beta=0.1,0.2", "the verb sweep runs each of several"),
    ("'loss.beta=range(1,3)'", "the verb sweep runs each of several"),
    ("~loss.beta", "loss.beta takes one value"),
    *(
        (form, "these words are not KEY=VALUE")
        for form in (
            *("pairs.jsonl", "simpo", "loss.beta 0.2", "loss.beta = 0.2", "loss.beta: 0.2", "export.merge"),
            *("'data.train=[a.jsonl,' 'b.jsonl]'", "data.train=[a.jsonl", "tracking.to[0]=mlflow"),
            *("loss@x=ipo", "loss@=ipo", "model.adapter@x=3", "'{model.path: tiny}'"),
        )
    ),
    # Options.
    ("--loss.beta=0.2", "did you mean loss.beta=0.2?"),
    ("--loss.betta=0.2", "did you mean loss.beta=0.2?"),
    ("--confg-dir x", "did you mean --config-dir?"),
    ("--config-dir nowhere", "nowhere is not a folder"),
    ("--check --cfg job", "argument -c/--cfg: not allowed with argument --check"),
    ("--config mine.yaml", "name your own YAML as it is: dpo-dist train mine.yaml"),
    ("--model tiny", "did you mean model.path=tiny?"),
    ("--loss ipo", "did you mean loss=ipo?"),
    ("--multirun", "the verb sweep runs each of several values"),
    # Other trainers' names: the value is kept, or written as ours.
    ("max_steps=3", "did you mean trainer.max_steps=3?"),
    ("optim.learning_rate=1e-5", "did you mean optim.lr=1e-05?"),
    ("--lora_target_modules q_proj v_proj", "did you mean 'model.adapter.target_modules=[q_proj, v_proj]'?"),
    ("--dataset_name a.jsonl", "did you mean data.train=a.jsonl?"),
    ("'data.train=[{file: a}]'", "did you mean path?"),
    ("gradient_checkpointing=true", "did you mean model.gradient_checkpointing=full?"),
    ("warmup_steps=0.1", "did you mean optim.warmup=0.1?"),
    ("lr_scheduler_type=constant_with_warmup", "did you mean optim.schedule=constant?"),
    ("lr_scheduler_type=polynomial", "one of constant, linear, cosine"),
    ("loss_type=sigmod", "did you mean loss=sigmoid?"),
    ("loss.simpo_gamma=1", "did you mean loss.options.gamma=1? It is an option of simpo"),
    ("loss=dpop loss.options.lambda=3", "did you mean loss.options.penalty_weight?"),
    ("optim.kind=paged_adamw_8bit", "optim.kind=adamw_bf16 keeps weights"),
    ("pairs.method=human", "did you mean pairs.method=people?"),
    ("model.attention=flash_attention_4", "not offered: write model.attention=auto"),
    ("optim.eps=1e-6", "not offered: the epsilon of AdamW is always 1e-8"),
    ("optim=lion", "not offered: write optim=adamw or adamw_bf16"),
    ("optim.kind=sgd", "not offered: write optim=adamw or adamw_bf16"),
    ("template=llama3", "the tokenizer's own chat template is used"),
    ("use_liger_kernel=true", "write model.fused=liger"),
    ("cutoff_len=64", "write data.max_length=64 data.truncation=both"),
    ("loss_weights=[1,0.2]", "write 'loss.terms=[{kind: sigmoid, weight: 1}, {kind: sft, weight: 0.2}]'"),
    ("adam_beta2=0.95", "write 'optim.betas=[0.9,0.95]'"),
    ("kto_chosen_weight=2", "write loss=kto loss.desirable_weight=2"),
    ("report_to=none", "write 'tracking.to=[]'"),
    ("tracking.wandb=off", "write 'tracking.to=[]'"),
    ("pref_ftx=0", "not needed"),
    ("--output json", "write --json"),
    ("--fix", "the doctor changes no file"),
    # Reward models, teachers and the sharding of experts or within nodes, as other trainers call them.
    *((f"{key}=rm", "write loss=reward; ") for key in ("loss", "loss.kind", "stage", "rlhf_type")),
    *((f"loss={name}", "write loss=reward; ") for name in ("bradley_terry", "reward-modeling")),
    ("reward_model=true", "write loss=reward"),
    ("center_rewards_coefficient=0.01", "loss.options.centre=0.01"),
    *(
        (f"loss={name}", "write loss=distill teacher.path=TEACHER; ")
        for name in ("gkd", "kd", "distillation")
    ),
    ("rlhf_type=gkd", "write loss=distill teacher.path=TEACHER; "),
    *(
        (f"{name}=org/big", "teacher.path=org/big")
        for name in ("teacher_model", "teacher.model", "teacher.name")
    ),
    *((f"{name}=32", "teacher.k=32") for name in ("teacher.top_k", "gkd_logits_topk", "topk_logits_k")),
    *((f"{name}=8", "parallelism.experts=8") for name in ("ep_size", "--expert-parallel-size")),
    *(
        (f"{name}=8", "parallelism.shard_size=8")
        for name in ("mics_shard_size", "fsdp_size", "dp_shard_size")
    ),
    *(
        (word, "write parallelism=zero3 parallelism.shard_size=8")
        for word in ("parallelism=hsdp", "hsdp=true", "fsdp_sharding_strategy=HYBRID_SHARD")
    ),
    ("tensor_parallel_size=8", "parallelism.experts shards experts, parallelism.sequence_parallel tokens"),
    ("sweep.method=optuna", "a W&B sweep searches"),
    *((f"loss={name}", "there is no online RL") for name in ("grpo", "reinforce++")),
    ("'loss.terms=[{kind: ppo}]'", "there is no online RL"),
]


_NO_ANSWER = ("there is no", "cannot have this value", "not KEY=VALUE", "cannot be read")
_ONLY_THE_USER_KNOWS = re.compile(r"\.\.\.|=[A-Z_/]+$|<|^KEY=|[{ ][a-z]+: [A-Z_]+[,}]|=\[?[A-Z]+\]?$")


def refused_proposals(remedy: str) -> list[str]:
    """The words of a remedy that a command would not accept; a rule between keys may need more of them."""
    whole = [word for word in re.findall(r"'([^']+)'", remedy) if "=" in word]
    bare = re.findall(r"(?<![\w.<'])\+?[a-z_]+(?:\.\w+)*(?:\[\d+\][\w.]*)?=[^\s;,?)'<]+", remedy)
    refused = []
    for word in [*whole, *(word.rstrip(":") for word in bare if not any(word in one for one in whole))]:
        try:
            if not _ONLY_THE_USER_KNOWS.search(word):
                configured(shlex.quote(word))
        except ConfigError as error:
            messages = [part.message for part in error.parts or (error,)]
            refused += [f"{word}: {one}" for one in messages if any(text in one for text in _NO_ANSWER)]
    return refused


@pytest.mark.parametrize(("typed", "text"), MISTYPED)
def test_a_mistake_gets_a_correction_that_is_accepted(typed: str, text: str) -> None:
    error = error_of(typed)
    assert text in error.block()
    assert "\n" not in error.message + error.where + error.got + error.expected + error.remedy
    assert [word for part in error.parts or (error,) for word in refused_proposals(part.remedy)] == []
    words = words_to_write(error.remedy)
    assert not words or not {*words} <= {*shlex.split(typed)}, "what stands there is no advice"


@pytest.mark.parametrize(
    ("typed", "key", "value"),
    [
        ("data.train=b.jsonl", "data.train", [SourceConfig("b.jsonl")]),
        ("tracking.to=mlflow", "tracking.to", ["mlflow"]),
        ("loss.terms=sft", "loss.terms", [LossTermConfig(LossKind.sft)]),
        ("model.adapter.target_modules=q_proj", "model.adapter.target_modules", ["q_proj"]),
        ("model.adapter.target_modules=all-linear", "model.adapter.target_modules", "all-linear"),
        ("evaluation.model=a", "evaluation.model", "a"),
        ("trainer.max_steps=1e3", "trainer.max_steps", 1000),
        ("trainer.micro_batch_tokens=4e3", "trainer.micro_batch_tokens", 4000),
        ("optim.max_grad_norm=none", "optim.max_grad_norm", None),
        ("trainer.max_steps=None", "trainer.max_steps", None),
        ("model.adapter=none", "model.adapter", None),
        ("model.gradient_checkpointing=none", "model.gradient_checkpointing", "none"),
        ("run.name=2024", "run.name", "2024"),
        ("run.name=1e3", "run.name", "1e3"),
        ("run.name=true", "run.name", "true"),
        ("optim.lr=1", "optim.lr", 1.0),
    ],
)
def test_what_is_no_mistake_is_taken(typed: str, key: str, value: object, tmp_path: Path) -> None:
    assert value_at(configured(typed), key) == value
    (file := tmp_path / "my.yaml").write_text(typed.replace("=", ": ", 1).replace("true", "'true'"))
    if key != "data.train" and typed != "run.name=1e3":  # which YAML reads as a number
        assert value_at(configured(str(file)), key) == value


def test_every_unknown_experiment_is_named() -> None:
    text = error_of("'+experiment=[qwen7,smolm2]' loss=ipoo loss.beta=x").block()
    for said in (
        "+experiment=qwen7b?",
        "+experiment=smollm2?",
        "loss=ipo?",
        "loss.beta cannot have this value",
    ):
        assert said in text


def test_the_example_for_a_word_without_a_key_is_one_of_the_verb() -> None:
    for verb, key in (("train", "data.train"), ("plan", "model.path"), ("evaluate", "run.dir")):
        assert error_of("output/a", verb=verb).expected == f"KEY=VALUE, such as {key}=..."


def test_a_place_does_not_repeat_a_password() -> None:
    for key in ("data.train=[{}]", "model.path={}", "data.train=[{{path: '{}'}}]"):
        error = error_of(shlex.quote(key.format("s3://name:secret@bucket/a")))
        assert "secret" not in error.block()
        assert "cannot be used" in error.message


def test_what_the_answers_to_other_trainers_names_propose_is_accepted() -> None:
    table = other_trainers()
    refused = []
    advice = {row.get("text", f"write {row.get('write')}"): row["names"] for row in table["advice"]}
    for answer, names in [*advice.items(), *table["methods"].items()]:
        given = {name.partition("=")[2] for name in names.split()} if "{value}" in answer else {"8"}
        for value in given:  # "": it may be anything
            values = [value] if value else ["8", "0.5", "a.jsonl"]
            found = [refused_proposals(answer.replace("{value}", value)) for value in values]
            refused += found[0] if all(found) else []
    assert refused == []


def stems(words: str) -> set[str]:
    return {word[:6].rstrip("s") for word in re.split(r"[^a-z0-9]+", words.lower()) if word}


# Names that are another trainer's for something else.
_ANOTHER_THING = {"loss_scale"}


def test_no_row_denies_a_key_or_a_kind_that_exists() -> None:
    table = other_trainers()

    def names_in(section: str) -> set[str]:
        return {name for names in table[section].values() for name in names.split()}

    denied = {
        name
        for row in table["advice"]
        if row.get("text", "").startswith("not offered")
        for name in row["names"].split()
    }
    named = {name for name in denied - _ANOTHER_THING if "=" not in name}
    ours = [stems(key) for key in run_keys() if "." in key]
    assert not named & names_in("keys")
    assert not [name for name in named if any(stems(name) <= words for words in ours)]
    # Values; methods are values of the loss. Words of a switch mean values of other keys, too.
    chosen = {value for key in run_keys() for value in choices(run_keys()[key])}
    chosen.update(*(preset_names(group, group_folders()) for group in SECTIONS.split("|")))
    values = {name.partition("=")[2] for name in denied - named} - {"true", "false"}
    assert not (values | names_in("methods")) & (chosen | names_in("values"))


def test_all_mistakes_of_a_command_are_one_error() -> None:
    foreign = """
        --model_name_or_path org/m --dataset_path a.jsonl --output_dir out --learning_rate 5e-6 --beta 0.1
        --per_device_train_batch_size 2 --gradient_accumulation_steps 8 --num_train_epochs 2
        --gradient_checkpointing --bf16 true --max_length 512 --lora_r 8 --lora_alpha 16 --report_to wandb
    """
    error = error_of(
        f"{foreign} loss.betta=1 trainer.max_steps=x optim.lr=0 loss=ipoo pairs.limit=3", verb="train"
    )
    lines = [line.strip().removeprefix("to do:").strip() for line in error.block().splitlines()]
    assert lines[0] == "configuration error: this command has 19 mistakes"
    assert len(lines) == 1 + 19
    for line in (
        "--learning_rate 5e-6: there is no option --learning_rate; did you mean optim.lr=5e-06?",
        "--gradient_checkpointing: there is no option --gradient_checkpointing; "
        "did you mean model.gradient_checkpointing=full?",
        "loss.betta=1: there is no key 'loss.betta'; did you mean loss.beta=1?",
        "trainer.max_steps=x: trainer.max_steps cannot have this value; "
        "set trainer.max_steps to a whole number or null, >= 1, or remove it",
        "optim.lr=0: optim.lr cannot have this value; set optim.lr to a number, > 0 and <= 1, or remove it",
        "pairs.limit=3: train does not read pairs.limit; remove pairs.limit, a key of pairs",
    ):
        assert line in lines
    [preset] = [
        line
        for line in lines
        if line.startswith("loss=ipoo: there is no loss named 'ipoo', expected one of aot")
    ]
    assert preset.endswith("did you mean loss=ipo?")


def test_all_rules_that_a_command_breaks_are_one_error() -> None:
    error = error_of("loss=sft loss.beta=1 trainer.eval_every=5 data.max_prompt_length=2000")
    assert error.message == "this command has 3 mistakes"
    assert "remove loss.beta" in error.remedy


@pytest.mark.parametrize(
    ("verb", "typed", "text"),
    [
        (
            "evaluate",
            "checkpoint=best",
            "for evaluate set evaluation.model=<run.dir>/checkpoints",
        ),
        ("compare", "reference=none", "compare does not read reference.mode"),
        ("pairs", "sampling.prompts=4", "pairs does not read sampling.prompts"),
        ("compare", "temperature=0", "did you mean sampling.temperature=0?"),
        ("train", "'export={checkpoint: best}'", "train does not read export"),
        ("pairs", "loss=ipo", "pairs does not read loss"),
    ],
)
def test_a_key_that_the_verb_does_not_read_is_refused(verb: str, typed: str, text: str) -> None:
    run = [] if verb == "compare" else RUN
    assert text in error_of(typed, verb=verb, run=run).block()


def test_rounds_in_a_file_add_the_keys_of_training_for_pairs_only(tmp_path: Path) -> None:
    (file := tmp_path / "rounds.yaml").write_text("pairs: {method: samples, rounds: 2}\n")
    run = [str(file), "compare.models=[a,b]", "data.eval=[b.jsonl]"]
    assert "compare does not read optim.lr" in error_of("optim.lr=1e-3", verb="compare", run=run).block()
    configured("optim.lr=1e-3", verb="pairs", run=[*RUN, str(file)])


def test_every_answer_names_keys_that_exist() -> None:
    table = other_trainers()
    for name in table["keys"]:
        assert name in run_keys()
    advice = [f"{row.get('write', '')} {row.get('text', '')}" for row in table["advice"]]
    for answer in (*advice, *table["methods"], *table["verbs"]):
        named = re.findall(rf"\b(?:{SECTIONS})\.[a-z0-9_.]*[a-z0-9]", answer)
        files = (".jsonl", ".md", ".yaml")
        assert [key for key in named if key not in run_keys() and not key.endswith(files)] == []


def test_options_may_be_anywhere_and_the_last_of_a_key_counts() -> None:
    arguments = split_words(["loss=ipo", "--config-dir", ".", "loss=hinge", "trainer.seed=3", "--cfg=job"])
    assert arguments.words == ["loss=ipo", "loss=hinge", "trainer.seed=3"]
    assert (str(arguments.config_dir), arguments.cfg) == (".", "job")
    config = configured("", run=[*RUN, *arguments.words, "tracking=off", "tracking=wandb", "trainer.seed=4"])
    assert (config.loss.kind, config.tracking.to, config.trainer.seed) == ("hinge", ["wandb"], 4)


def test_paths_need_no_quotes() -> None:
    config = configured("'data.train=[~/x, a=b, modèle, data/*.jsonl]' model.path=~/x")
    assert [source.path for source in config.data.train] == ["~/x", "a=b", "modèle", "data/*.jsonl"]
    assert config.model.path == "~/x"
