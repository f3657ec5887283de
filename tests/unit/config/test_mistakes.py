"""Mistakes in a command, and options of other trainers, are one error with an answer to each."""

import re
import shlex
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from dpo_dist.compat.other_trainers import other_trainers
from dpo_dist.config.command_line import split_words
from dpo_dist.config.keys import run_keys
from dpo_dist.foundation.errors import ConfigError
from tests.support.remedies import words_to_write
from tests.unit.config.support import RUN, configured, error_of

pytestmark = pytest.mark.slow

SECTIONS = "|".join(name for name in run_keys() if "." not in name)

# A command line as typed, and a part of the error.
MISTYPED = [
    (
        "loss=[sigmoid,sft]",
        "write 'loss.terms=[{kind: sigmoid}, {kind: sft}]' for their sum, or choose loss=sigmoid",
    ),
    ("model=Qwen/Qwen2.5-7B", "write model.path=Qwen/Qwen2.5-7B"),
    ("data=hard.jsonl", "write 'data.train=[hard.jsonl]' or 'evaluation.data=[hard.jsonl]'"),
    ("optim.kind=paged_adamw_8bit", "did you mean optim.kind=adamw_8bit?"),
    ("'data.train=[{file: a}]'", "write path: a"),
    ("foo=1", "the sections are run, model, "),
    ("template=llama3", "the tokenizer's own chat template is used"),
    ("loss.beta=0,2", "write loss.beta=0.2: a decimal point"),
    ("optim.lr=1,5e-4", "write optim.lr=1.5e-4: a decimal point"),
    ("optim.lr=1e-4,", "write optim.lr=1e-4"),
    ("--config mine.yaml", "name your own YAML as it is: dpo-dist train mine.yaml"),
    ("cpu=true", "hide the GPUs: CUDA_VISIBLE_DEVICES="),
    ("device=cuda:0", "not needed: weights are placed by parallelism"),
    ("gpus=2", "dpo-dist launch --num_processes 2 train"),
    ("loss=sigmoid,sft", "write 'loss.terms=[{kind: sigmoid}, {kind: sft}]'"),
    ("optim.betas=0.9,0.95", "write 'optim.betas=[0.9,0.95]'"),
    ("optim.betas=(0.9,0.95)", "write 'optim.betas=[0.9,0.95]'"),
    ("data.eval=0.1", "write data.eval_share=0.1"),
    ("model.adapter=lora", "write model.adapter.r=16"),
    ("plan.gpu=A100", "did you mean plan.gpu=a100-80g?"),
    ("export.merge", "write export.merge=true"),
    ("run.dir=", "text that is not empty"),
    ("+experiment=qwen7", "+experiment=qwen7b?"),
    ("lossbeta=1", "did you mean loss.beta?"),
    ("max_lenght=5", "did you mean data.max_length?"),
    ("loss.ldalpha=0.3", "did you mean loss.ld_alpha?"),
    ("prompts=3", "write samples.prompts=3 or compare.prompts=3"),
    ("tracking.to=[wandb,mlflo]", "did you mean 'tracking.to=[wandb, mlflow]'?"),
    ("'loss.terms=[{kind: sigmoid}, {kind: sfft, weight: 2}]'", "{kind: sft, weight: 2}]'?"),
    ("sweep.method=optuna", "write sweep.trials=20 sweep.by=eval_rewards/accuracies"),
    ("export.method=x", "the keys of export are checkpoint, "),
    ("export.method=delta", "did you mean pairs.method?"),
    ("json=true", "write --json"),
    ("--output json", "write --json"),
    ("--shards 4", "write encode.part=1/4"),
    ("pairs.method=online", "write pairs.method=samples pairs.rounds=3"),
    ("plan.gpu=4090", "did you mean plan.gpu=rtx4090-24g?"),
    ("data.eval_share=20%", "write data.eval_share=0.2"),
    ("data.eval_share=12.3456789%", "write data.eval_share=0.123456789"),
    ("data.eval_share=200%", "set data.eval_share to a number"),
    ("optim.lr=5e6", "a number, > 0 and <= 1"),
    ("sampling.endpoint.url=localhost:8000", "write sampling.endpoint.url=http://localhost:8000/v1"),
    ("model.path=https://huggingface.co/Qwen/Qwen3-0.6B", "did you mean Qwen/Qwen3-0.6B?"),
    ("model.path=hf.co/Qwen/Qwen3-0.6B/tree/main", "did you mean Qwen/Qwen3-0.6B?"),
    ("data.train=[https://huggingface.co/datasets/org/name/]", "did you mean org/name?"),
    ("'data.eval=[{path: https://huggingface.co/datasets/org/n/blob/main/a.csv}]'", "did you mean org/n?"),
    ("data.train.path=a", "'data.train=[{path: a}]'"),
    ("'data.cache=${run.rot}/x'", "run.rot"),
    ("'loss.terms={kind: sft}'", "write 'loss.terms=[{kind: sft}]'"),
    ("'loss.terms=[dpo, sft]'", "did you mean 'loss.terms=[sigmoid, sft]'?"),
    ("'loss.options={1.5: 0.3}'", "remove it"),
    ("data.train=a.jsonl", "write 'data.train=[a.jsonl]'"),
    ("trainer.micro_batch_tokens=100000000000000000000", "auto, or a whole number, >= 1"),
    ("trainer.epochs=1e300", "a number, > 0 and <= 1e+09"),
    ("tracking.samples=2000", "a whole number, >= 0 and <= 1000"),
    ("optim.lr=[1e-5]", "set optim.lr to a number"),
    ("trainer.max_steps=1e3", "write trainer.max_steps=1000"),
    ("trainer.max_steps=1e3", " 1000.0\n"),
    ("reference=off", "did you mean reference=none?"),
    ("--lora_target_modules q_proj v_proj", "write 'model.adapter.target_modules=[q_proj,v_proj]'"),
    ("--loss_type sigmoid sft", "write 'loss.terms=[{kind: sigmoid}, {kind: sft}]'"),
    ("--optim adamw_torch", "choose optim=adamw, adamw_8bit or muon"),
    ("tracking.wandb=off", "write 'tracking.to=[]'"),
    ("tracking.also=[tensorboard]", "write 'tracking.to=[tensorboard]'"),
    ("~loss.beta", "loss.beta takes one value"),
    ("'model.adapter={target_modules: all}'", "did you mean model.adapter.target_modules=all-linear?"),
    ("loss.router=0.01", "write loss.router.aux_coefficient=0.01"),
    ("loss.aux_coefficient=0.01", "write loss.router.aux_coefficient=0.01"),
    ("export.checkpoint=3", "such as step-000100"),
    ("run.root=null", "set run.root to text; remove it for the default, output"),
    ("run.name=true", "write 'run.name=\"true\"'"),
    # `loss=simpo` would remove the terms.
    *(
        (f"{terms} {option}", f"write the entry {{kind: {kind}, options: {{{name}: 1}}}} in loss.terms")
        for terms, option, kind, name in (
            ("loss=sigmoid_sft", "loss.gamma=1", "simpo", "gamma"),
            ("'loss.terms=[sft, simpo]'", "--simpo_gamma 1", "simpo", "gamma"),
            ("'loss.terms=[{kind: sft}, {kind: beta_dpo}]'", "loss.alpha=1", "beta_dpo", "alpha"),
        )
    ),
    ("--config-dir nowhere", "nowhere is not a folder"),
    ("--confg-dir x", "did you mean --config-dir?"),
    # Values of other trainers are kept.
    ("lora_target=[q_proj,v_proj]", "write 'model.adapter.target_modules=[q_proj,v_proj]'"),
    ("loss_weights=[1,0.2]", "write 'loss.terms=[{kind: sigmoid, weight: 1}, {kind: sft, weight: 0.2}]'"),
    ("loss.alpha=0.3", "write loss.options.alpha=0.3; this option needs loss=odpo or loss=beta_dpo"),
    ("loss.simpo_gamma=1", "write loss.options.gamma=1; this option needs loss=simpo"),
    ("optim.eps=1e-6", "not offered: the epsilon of AdamW is always 1e-8"),
    ("loss.bco_delta=running_mean", "write loss.options.delta=running_mean"),
    ("loss=dpop loss.options.lambda=3", "did you mean loss.options.penalty_weight?"),
    ("loss.options.gammma=0.5", "did you mean loss.options.gamma? It is an option of simpo"),
    ("loss=dpop loss.options.gama=0.5", "did you mean loss.options.gamma? It is an option of simpo"),
    ("lambda=3", "write loss.options.penalty_weight=3 or loss.options.odds_weight=3"),
    ("loss.gamma_beta_ratio=0.5", "loss.options.gamma=..., which is this ratio times loss.beta"),
    ("kto_chosen_weight=2", "write loss=kto loss.desirable_weight=2"),
    ("adam_beta2=0.95", "write 'optim.betas=[0.9,0.95]'"),
    ("lr_scheduler_type=polynomial", "one of constant, linear, cosine, inverse_sqrt, wsd"),
    ("data.eval.0.path=a.jsonl", "write this key inside an entry: 'data.eval=[{path: ...}]'"),
    ("data.train.weight=2", "write this key inside an entry: 'data.train=[{path: ..., weight: 2}]'"),
    # Quotes and spaces: one hint.
    ("'data.train=[a.jsonl,' 'b.jsonl]'", "write 'data.train=[a.jsonl, b.jsonl]'"),
    ("'nonsense=[a.jsonl,' 'b.jsonl]'", "in quotes"),
    ("loss.beta = 0.2", "write loss.beta=0.2"),
    ("loss.beta: 0.2", "write loss.beta=0.2"),
    ("loss.beta = x", "write loss.beta=..."),
    ("nonsense = 0.2", "no spaces around ="),
    ("model.adapter=sft/adapter", "write model.adapter.path=sft/adapter"),
    # A key without its section, and a word of an option.
    ("max_steps=3", "write trainer.max_steps=3"),
    ("warmup_steps=0.1", "write optim.warmup_ratio=0.1"),
    ("loss=simpo loss.kind=ipo", "loss=NAME replaces all options of the loss"),
    ("lr_scheduler_type=constant_with_warmup", "write optim.schedule=constant"),
    ("--multirun", "the verb sweep runs each of several values"),
    ("--check --cfg job", "argument -c/--cfg: not allowed with argument --check"),
    ("/tmp", "the key too: run.dir=/tmp or model.path=/tmp or 'data.train=[/tmp]'"),
    ("loss.beta 0.2", "write loss.beta=0.2"),
    # What is not offered has an answer that says what is.
    *((f"{key}=kto", "write loss=kto") for key in ("loss_type", "stage", "rl")),
    ("pref_loss=kto_pair", "pairs with data.unpair=true"),
    ("loss=qrpo", "on scored pairs write loss=reward_aware"),
    ("pref_loss=bco_unpaired", "write loss=kto; on pairs loss=bco_pair"),
    ("pref_loss=sigmoid_sft", "write loss=sigmoid_sft"),
    ("rl=simpo", "write loss=simpo"),
    ("model.attention=flash_attention_4", "not offered: write model.attention=auto"),
    ("--attn_implementation kernels-community/flash-attn3", "write model.attention=flash_attention_3"),
    ("flash_attn=fa3", "write model.attention=flash_attention_3"),
    ("use_liger_kernel=true", "write model.fused=liger"),
    ("loss_type=[sigmoid,bco]", "write 'loss.terms=[{kind: sigmoid}, {kind: bco_pair}]'"),
    ("loss_type=sigmod", "did you mean loss=sigmoid?"),
    ("pref_ftx=0", "not needed"),
    ("pref_ftx=0.5", "write 'loss.terms=[{kind: sigmoid}, {kind: sft, weight: 0.5}]'"),
    ("cutoff_len=64", "write data.max_length=64 data.truncation=both"),
    ("loss=simpo reference.path=m", "(if a file sets it, write reference.path=null), or choose a loss with"),
    ("reference.path=", "to do:    remove the key, or write a value"),
    ("loss@x=ipo", "remove @"),
    ("run=3", "run is a section"),
    ("loss=null", "no loss named 'null'"),
    ("model.adapter@x=3", "words that are not KEY=VALUE"),
    ("loss@=ipo", "words that are not KEY=VALUE"),
    ("loss.beta=range(0.1,0.2", "close each bracket"),
    ("data.eval_share=0.1 trainer.eval_every=1 trainer.keep_best=eval_lss", "did you mean eval_loss? "),
    ("keep_best=true", "write trainer.keep_best=eval_loss"),
    ("run_name=true", "write run.name=..., "),
    ("pairs.method=human", "did you mean pairs.method=people?"),
    ("tracking=tensorboard", "write 'tracking.to=[tensorboard]'"),
    ("report_to=none", "write 'tracking.to=[]'"),
    ("--report_to mlflow", "write 'tracking.to=[mlflow]'"),
    ("tracking.to=trackio", "write 'tracking.to=[trackio]'"),
    ("tracking=none", "did you mean tracking=off?"),
    (
        "sampling.temperature=0 sampling.top_p=0.9",
        "remove sampling.top_p (if a file sets it, write sampling.top_p=1), or set sampling.temperature=...",
    ),
    ("data.untrained=[foo]", "set data.untrained[0] to empty_thoughts, thoughts"),
    ("'loss.terms=[{kind: custom}]'", "got:      null, custom"),
    ("optim.max_grad_norm=none", "write optim.max_grad_norm=null"),
    ("trainer.max_steps=None", "write trainer.max_steps=null"),
    *((f"loss={name}", "there is no online RL") for name in ("grpo", "reinforce++", "[grpo,sft]")),
    ("'loss.terms=[{kind: ppo}]'", "there is no online RL"),
    ("stage=rm", "pairs.reward_model=MODEL"),
    # Values of other types.
    ("loss=[]", "write loss=NAME: aot, "),
    ("reference=[]", "write reference=NAME: adapter, "),
    ("'data.train={}'", "write 'data.train=[...]'"),
    ("optim=null", "no optim named 'null'"),
    ("model=7", "a path is no preset"),
    # An entry of a list by its place.
    ("tracking.to[0]=mlflow", "write 'tracking.to=[mlflow]'"),
    ("report_to[0]=mlflow", "write 'tracking.to=[mlflow]'"),
    ("data.train[0]=b.jsonl", "write 'data.train=[b.jsonl]'"),
    ("data.train[1].path=b.jsonl", "write this key inside an entry: 'data.train=[{path: ...}]'"),
    ("nonsense[0]=2", "the sections are run, model, "),
    # A group of presets, or a mapping, in place of the key inside it.
    ("--model tiny", "write model.path=tiny"),
    ("--data std.csv", "write 'data.train=[std.csv]'"),
    ("--reference ./base", "write reference.path=./base"),
    ("--loss ipo", "write loss=ipo"),
    ("--loss dpo", "did you mean loss=sigmoid?"),
    ("--parallelism fsdp", "did you mean parallelism=zero3?"),
    ("--tracking mlflow", "write 'tracking.to=[mlflow]'"),
    ("--run x", "write run.KEY=VALUE; --help run lists its keys"),
    ("sampling.endpoint=http://localhost:8000/v1", "write sampling.endpoint.url=http://localhost:8000/v1"),
    ("model.adapter=16", "write model.adapter.r=16"),
    ("model.images=true", "write model.images.train=..., one of none, projector, tower"),
    # A near key that cannot have the value says what it takes.
    ("reference.modle=tiny", "did you mean reference.mode, one of auto, cached"),
    ("reference.model=tiny", "write reference.path=tiny"),
    ("reference.kind=live", "write reference.mode=live"),
    # A name of a preset, a size, a GPU, a number with a unit, a range, a slice.
    ("zephyr7b", "write +experiment=zephyr7b"),
    ("simpo", "write loss=simpo"),
    ("7B", "write model=qwen2_5_7b"),
    ("plan.gpus=8xH100", "write plan.gpus=8 plan.gpu=h100-80g"),
    ("plan.gpu=2*a100", "write plan.gpus=2 plan.gpu=a100-80g"),
    ("plan.gpus=h200", "write plan.gpu=h200-141g"),
    ("plan.gpu=rtx-4090", "did you mean plan.gpu=rtx4090-24g?"),
    ("plan.gpu=24GB", "did you mean plan.gpu=rtx4090-24g?"),
    ("plan.gpu=T4", "set plan.gpu to one of"),
    ("plan.nodes=2", "plan.gpus counts the GPUs of all nodes"),
    ("data.max_length=2k", "write data.max_length=2000"),
    ("model.images.max_pixels=1.5M", "write model.images.max_pixels=1500000"),
    ("trainer.seed=1..3", "the verb sweep takes 'trainer.seed=range(1,4)'"),
    ("loss.beta=0.01-0.5", "the verb sweep searches 'loss.beta=interval(0.01,0.5)' with sweep.trials=20"),
    ("'data.eval=[org/name:test[:10%]]'", "its first records: write {path: NAME, split: train, limit: 1000}"),
    ("data.eval=(b.csv)", "write 'data.eval=[b.csv]'"),
    ("'{model.path: tiny}'", "each as KEY=VALUE, such as loss.beta=0.2"),
    # Other trainers.
    ("optim=lion", "not offered: write optim=adamw, adamw_8bit or muon"),
    ("optim.kind=sgd", "not offered: write optim=adamw, adamw_8bit or muon"),
    ("optim.decay=0.1", "write optim.decay_ratio=0.1 or optim.weight_decay=0.1"),
    ("optim.clip=1.0", "write optim.max_grad_norm=1.0"),
    ("pairs.iterations=3", "write pairs.rounds=3"),
    ("--pretrain ./m", "write model.path=./m"),
    ("--fix", "the doctor changes no file"),
    # A URL with one slash, or none.
    ("data.train=[gs:/bucket/pairs.jsonl]", "did you mean gs://bucket/pairs.jsonl?"),
    ("data.eval=[https:host/pairs.jsonl]", "did you mean https://host/pairs.jsonl?"),
    ("run.mirror=s3:/bucket/runs", "did you mean s3://bucket/runs?"),
]


@pytest.mark.parametrize(("typed", "text"), MISTYPED)
def test_a_mistake_gets_a_correction(typed: str, text: str) -> None:
    error = error_of(typed)
    assert text in error.block()
    assert "\n" not in error.message + error.where + error.got + error.expected + error.remedy
    if text.startswith("write ") and "..." not in text:
        corrected = error.remedy.removeprefix("write ").partition(";")[0]
        for word in [word for word in shlex.split(corrected) if "=" in word]:
            OverridesParser.create().parse_override(word)


_NO_ANSWER = ("there is no", "cannot have this value", "not KEY=VALUE", "cannot be composed")
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


@pytest.mark.parametrize("typed", [typed for typed, _ in MISTYPED])
def test_what_an_error_proposes_is_accepted(typed: str) -> None:
    error = error_of(typed)
    assert [word for part in error.parts or (error,) for word in refused_proposals(part.remedy)] == []
    words = words_to_write(error.remedy)
    assert not words or not {*words} <= {*shlex.split(typed)}, "what stands there is no advice"


def test_a_size_that_no_preset_has_is_no_name() -> None:
    assert error_of("13B", verb="plan").remedy == "a size is no model: write model.path=ORG/NAME"
    assert error_of("org/name", verb="plan").remedy == "write the key too: model.path=org/name"


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
        "--learning_rate 5e-6: there is no option --learning_rate; write optim.lr=5e-6",
        "--gradient_checkpointing: there is no option --gradient_checkpointing; "
        "write model.gradient_checkpointing=full",
        "loss.betta=1: there is no key 'loss.betta'; did you mean loss.beta?",
        "trainer.max_steps=x: trainer.max_steps cannot have this value; "
        "set trainer.max_steps to a whole number or null, >= 1; remove it for the default, null",
        "optim.lr=0: optim.lr cannot have this value; "
        "set optim.lr to a number, > 0 and <= 1; remove it for the default, 1e-06",
        "loss (ipoo): there is no loss named 'ipoo'; did you mean loss=ipo?",
        "pairs.limit=3: train does not read pairs.limit; remove pairs.limit, a key of pairs",
    ):
        assert line in lines


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
        ("export", "output=foo", "write run.dir=foo or export.output=foo"),
        ("compare", "reference=none", "compare does not read reference.mode"),
        ("compare", "samples.prompts=4", "write compare.prompts=4"),
        ("compare", "temperature=0", "write sampling.temperature=0"),
        ("doctor", "max_new_tokens=9", "write sampling.max_new_tokens=9"),
        ("compare", "A B", "write the key too: 'compare.models=[A,B]'"),
        ("evaluate", "output/a", "write the key too: run.dir=output/a"),
        ("doctor", "a.csv", "write the key too: 'data.train=[a.csv]'"),
        ("sweep", "'loss.beta=(0.1,0.2)'", "write loss.beta=0.1,0.2"),
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


@pytest.mark.parametrize("typed", ["sampling.judge.model=x", "samp.endpoint.model=x"])
def test_of_keys_with_one_last_part_the_nearest_is_named(typed: str) -> None:
    assert "sampling.endpoint.model" in error_of(typed).remedy
