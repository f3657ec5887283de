"""Mistyped command lines, and options of other trainers, get one block with the correction."""

import re
import shlex
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from dpo_dist.config.aliases import KEY_ALIASES, REMEDIES, SOURCE_ALIASES
from dpo_dist.config.data_schema import SourceConfig
from dpo_dist.config.keys import key_types, run_keys
from dpo_dist.config.load import compose, load_run_config, resolve
from dpo_dist.config.options import divide
from dpo_dist.config.schema import RunConfig
from dpo_dist.config.verbs import keys_of
from dpo_dist.errors import ConfigError

RUN = ["model.path=m", "data.train=[a.jsonl]"]
SECTIONS = "|".join(name for name in run_keys() if "." not in name)

# A command line as typed, and a part of the error.
MISTYPED = [
    # A group takes one preset.
    ("loss=[sigmoid,sft]", "loss.terms=[{kind: sigmoid, weight: 1}, {kind: sft, weight: 1}]"),
    ("loss=[dpo,nll]", "loss.terms=[{kind: sigmoid, weight: 1}, {kind: sft, weight: 1}]"),
    ("data=[hh_rlhf,ultrafeedback]", "data.train="),
    ("data=[a.jsonl,b.jsonl]", "data.train=[a.jsonl, b.jsonl]"),
    ("tracking.also=[tensorbord]", "did you mean tensorboard?"),
    ("tracking.also=[wandb]", "one of tensorboard, mlflow"),
    ("parallelism=[zero3,ddp]", "choose one of ddp, zero2, zero3"),
    ("model=Qwen/Qwen2.5-7B", "named by model.path=Qwen/Qwen2.5-7B"),
    ("data=my.jsonl", "named by 'data.train=[my.jsonl]'"),
    ("loss=kto", "one of "),
    ("loss=DPO", "did you mean loss=sigmoid?"),
    ("loss=null", "choose one of aot"),
    ("optim=sgd", "one of adamw, adamw_8bit"),
    ("parallelism=deepspeed", "did you mean parallelism=zero3?"),
    ("tracking=none", "one of off, wandb"),
    ("+experiment=qwen7b +experiment=smoke", "write '+experiment=[qwen7b,smoke]'"),
    ("loss=sigmoid,ipo", "one job for each value"),
    # Names of other trainers.
    ("learning_rate=1e-5", "write optim.lr=1e-5"),
    ("optim.learning_rate=1e-5", "write optim.lr=1e-5"),
    ("training.learning-rate=1e-5", "write optim.lr=1e-5"),
    ("--learning_rate 1e-5", "write optim.lr=1e-5"),
    ("--learning-rate=1e-5", "write optim.lr=1e-5"),
    ("trainer.save_steps=100", "write trainer.save_every=100"),
    ("eval_steps=100", "write trainer.eval_every=100"),
    ("eval_on_start=true", "write trainer.eval_at_start=true"),
    ("logging_steps=5", "write trainer.log_every=5"),
    ("batch_size=4", "write trainer.global_batch_pairs=4"),
    ("per_device_train_batch_size=1", "trainer.global_batch_pairs"),
    ("compare.judge=org/model", "set pairs.reward_model"),
    ("generate_during_eval=true", "set samples.prompts=16"),
    ("report_to=wandb", "tracking.wandb=auto"),
    ("deepspeed=ds.json", "parallelism=zero3"),
    ("lora_rank=8", "model.adapter={r: 16"),
    ("'model.adapter={rank: 8}'", "did you mean r?"),
    ("model_name_or_path=org/name", "write model.path=org/name"),
    ("loss.type=ipo", "write loss=ipo"),
    ("loss.loss_type=dpo", "write loss=sigmoid"),
    ("cutoff_len=512", "write data.max_length=512"),
    ("train=x.jsonl", "write 'data.train=[x.jsonl]'"),
    ("data.path=x", "write 'data.train=[x]'"),
    ("output_dir=out/a", "write run.dir=out/a"),
    ("bf16=true", "model.dtype=bf16"),
    ("fp16=true", "set model.dtype=fp16"),
    ("lr_scheduler_type=polynomial", "one of constant, constant_with_warmup, linear, cosine, inverse_sqrt"),
    ("lr_scheduler_type=constant_with_warmup", "write optim.schedule=constant_with_warmup"),
    ("optim.schedule=cosine_with_min_lr", "optim.schedule=cosine? with optim.min_lr_ratio=0.1 for a floor"),
    ("optim.warmup_ratio=0.1 optim.warmup_steps=5", "the length of the warm-up is given twice"),
    ("pure_bf16=true", "an update below 2^-9 of a weight is lost"),
    ("optim.master_weights=false", "model.dtype=bf16 has float32 master weights"),
    ("bf16=true optim.master_weight_dtype=bf16", "model.dtype=bf16"),
    ("fp16=true pure_bf16=true", "fp16"),
    ("+experiment=qwen7b optim.state_dtype=bf16", "an update below 2^-9 of a weight is lost"),
    ("optim=adamw_8bit stochastic_rounding=true", "an update below 2^-9 of a weight is lost"),
    ("optim.kind=adamw_bf16", "set optim.kind to one of these"),
    ("model.dtype=bf16_full", "set model.dtype to one of these"),
    ("optim.kind=paged_adamw_8bit", "did you mean optim.kind=adamw_8bit?"),
    ("optim=paged_adamw_32bit", "did you mean optim=adamw?"),
    ("warmup_steps=10", "write optim.warmup_steps=10"),
    ("min_lr=1e-7", "set optim.min_lr_ratio"),
    ("min_lr_rate=0.1", "write optim.min_lr_ratio=0.1"),
    ("'data.train=[{file: a}]'", "did you mean path?"),
    ("'data.train=[{path: a, max_samples: 9}]'", "did you mean limit?"),
    ("max_completion_length=128", "set data.max_length"),
    ("val_size=0.1", "data.eval_share"),
    ("dataset_train_split=train", "split of a source"),
    ("torch_dtype=bfloat16", "write model.dtype=bf16"),
    ("torch_dtype=auto", "write model.dtype=..."),
    ("reference=../base", "named by reference.path=../base"),
    ("hydra.run.dir=out", "run.dir sets the run directory"),
    ("hydra.job.chdir=true", "has no effect"),
    # A guess, if it is likely enough.
    ("+loss.foo=1", "the keys of loss are kind, beta, "),
    ("loss.alpha=1", "loss.alpha_coefficient or loss.offset_alpha or loss.beta_alpha or loss.ld_alpha"),
    ("trainer.steps=100", "the keys of trainer are global_batch_pairs"),
    ("trainer.batch=4", "trainer.global_batch_pairs or trainer.micro_batch_tokens"),
    ("foo=1", "the sections are run, model, "),
    ("lossbeta=1", "did you mean loss.beta?"),
    ("trainer.max_step=9", "did you mean trainer.max_steps?"),
    # Overrides that Hydra cannot read, with the correct quoting.
    ("model.path=~/m", "'~' needs quotes"),
    ("'data.train=[~/x, b.jsonl]'", "write 'data.train=[\"~/x\",b.jsonl]'"),
    ("model.path=/tmp/modèle", "'è' needs quotes"),
    ("model.path=a=b", "'=' needs quotes"),
    ("'data.train=[a.jsonl,' 'b.jsonl]'", "put it in quotes: 'data.train=[a.jsonl, b.jsonl]'"),
    ("loss.beta = 0.2", "write loss.beta=0.2, without spaces"),
    ("loss.beta= 0.2", "write loss.beta=0.2, without spaces"),
    ("loss.beta =0.2", "write loss.beta=0.2, without spaces"),
    ("loss.beta:0.2", "write loss.beta=0.2"),
    ("--loss.beta=0.2", "write loss.beta=0.2"),
    ("loss.beta=[1", "a bracket is not closed"),
    ("loss.beta=0,2", "a decimal point is a dot: loss.beta=0.2"),
    ("=3", "cannot be read"),
    ("my.yaml", "--config-dir DIR +experiment=NAME"),
    ("'data.cache=${run.rot}/x'", "run.rot"),
    ("loss.beta=0.1,", "write loss.beta=0.1"),
    ("'data.train=[{path=a.jsonl, limit=9}]'", "write 'data.train=[{path: a.jsonl, limit: 9}]'"),
    ("'data.train=[{a.jsonl}]'", "a mapping {name: value}"),
    ("loss=ipo.yaml", "did you mean loss=ipo?"),
    ("+experiment=conf/experiment/qwen7b.yaml", "did you mean +experiment=qwen7b?"),
    ("data.template_date=today", "write data.template_date=2024-07-26"),
    ("'optim.betas=(0.9,0.95)'", "write 'optim.betas=[0.9,0.95]'"),
    ('\'data.train=["a.jsonl" "b.jsonl"]\'', 'write \'data.train=["a.jsonl","b.jsonl"]\''),
    # Values.
    ("optim.betas=0.9", "write 'optim.betas=[0.9,0.999]'"),
    ("data.eval=null", "write data.eval=[]"),
    ("trainer.max_steps=-1", "in that range, or null"),
    ("'loss.terms=[{kind: sigmoid}, {kind: nll}]'", "where:    loss.terms[1].kind"),
    ("'loss.terms=[{kind: sigmoid}, {kind: nll}]'", "did you mean loss.terms[1].kind=sft?"),
    ("'loss.terms={kind: sft}'", "write 'loss.terms=[{kind: sft}]'"),
    ("'data.train={path: a}'", "write 'data.train=[{path: a}]'"),
    ("data.train=a.jsonl", "write 'data.train=[a.jsonl]'"),
    ("data.train.weight=2", "write 'data.train=[{path: PATH, weight: 2}]'"),
    ("data.eval.path=a.jsonl", "write 'data.eval=[{path: a.jsonl}]'"),
    ("loss.terms.weight=2", "write 'loss.terms=[{kind: KIND, weight: 2}]'"),
    ("data.train=[[a]]", "data.train[0] is not a source"),
    ("optim.lr=[1e-5]", "set optim.lr to a number"),
    ("trainer.max_steps=1e3", "write trainer.max_steps=1000"),
    ("trainer.seed=1 trainer.seed=x", "where:    command line: trainer.seed=x"),
    ("tracking.wandb=false", "did you mean tracking.wandb=off?"),
    ("model.dtype=half", "did you mean model.dtype=fp16?"),
    ("model.dtype=int32", "set model.dtype to one of these"),
    ("run.dir=", "run.dir is empty"),
    ("model.path=", "model.path is empty"),
    ("'data.train=[\"\"]'", "data.train[0].path is empty"),
    ("~loss.beta", "cannot be removed"),
    ("model.adapter.r=8", "+model.adapter.r="),
    ("loss=[simpo]", "write loss=simpo"),
    ("loss.kind=[sigmoid,sft]", "loss.terms=[{kind: sigmoid, weight: 1}, {kind: sft, weight: 1}]"),
    ("data.train+=[b.jsonl]", "the whole list: 'data.train=[FIRST,SECOND]'"),
    ("data.truncation=left", "did you mean data.truncation=keep_end?"),
    ("data.on_bad_record=skip", "did you mean data.on_bad_record=drop?"),
    ("tracking.wandb=on", "did you mean tracking.wandb=online?"),
    ("model.gradient_checkpointing=all", "set model.gradient_checkpointing=full"),
    ("model.adapter.rank=8", "write 'model.adapter={r: 8}'"),
    ("'model.adapter={target_modules: all}'", "write target_modules: all-linear"),
    ("parallelism.stage=3", "choose parallelism=zero3"),
    ("trainer.devices=8", "options of the launcher come before -m"),
    ("+exp=qwen7b", "write +experiment=NAME"),
    # Experts, long sequences, adapters, exports.
    ("router_aux_loss_coef=0.01", "write loss.router.aux_coefficient=0.01"),
    ("moe_aux_loss_coef=0.01", "write loss.router.aux_coefficient=0.01"),
    ("loss.router.aux_loss_coef=0.01", "write loss.router.aux_coefficient=0.01"),
    ("output_router_logits=true", "set loss.router.aux_coefficient=model"),
    ("activation_offloading=true", "write model.activation_offload=true"),
    ("context_parallel_size=2", "write parallelism.sequence_parallel=2"),
    ("tiled_mlp=true", "set model.mlp_tile_tokens=2048"),
    ("rope_scaling=yarn", "set it in its config.json"),
    ("use_dora=true", "'model.adapter={variant: dora}'"),
    ("loraplus_lr_ratio=16", "have the rate optim.lr"),
    ("freeze_trainable_layers=2", "'model.adapter={r: 16}'"),
    ("bnb_4bit_quant_type=nf4", "set model.quantization=nf4"),
    ("ref_model_adapters=sft", "the adapter it started from"),
    ("merge_and_unload=true", "export.merge=true"),
    ("export_dir=out", "write export.output=out"),
    ("export_size=2", "at most 5 GB"),
    ("use_ema=true", "set trainer.ema_decay=0.99"),
    ("ema_decay=0.99", "write trainer.ema_decay=0.99"),
    ("expert_parallel_size=2", "parallelism=zero3 shards weights"),
    ("loss.router.aux_coefficient=true", "to model, a number above 0, or null"),
    ("loss.router.aux_coefficient=auto", "set loss.router.aux_coefficient=model"),
    ("loss.router.aux_coef=0.1", "write loss.router.aux_coefficient=0.1"),
    ("loss.router.z_coef=0.001", "write loss.router.z_coefficient=0.001"),
    ("loss.router.z_coefficient=model", "set loss.router.z_coefficient to a number"),
    ("loss.router=0.01", "write loss.router.aux_coefficient=..."),
    ("loss.aux_coefficient=0.01", "did you mean loss.router.aux_coefficient?"),
    ("export.dtype=float16", "did you mean fp16?"),
    ("export.dtype=half", "did you mean fp16?"),
    ("export.dtype=torch.bfloat16", "did you mean bf16?"),
    ("export.dtype=float", "did you mean fp32?"),
    ("export.dtype=fp8", "bf16, fp16 or fp32"),
    ("model.dtype=torch.float16", "did you mean model.dtype=fp16?"),
    ("model.dtype=32", "did you mean model.dtype=fp32?"),
    ("export.checkpoint=out/checkpoints/step-000100/", "did you mean step-000100?"),
    ("export.checkpoint=last", "did you mean latest?"),
    ("export.checkpoint=3", "such as step-000100"),
    ("export.out=x", "write export.output=x"),
    ("export.verify=false", "write export.check=false"),
    ("export.max_shard_size=5GB", "at most 5 GB"),
    ("export.average=step-000100", "write 'export.average=[step-000100]'"),
    ("'model.adapter={use_dora: true}'", "write variant: dora in its place"),
    ("'model.adapter={rslora: true}'", "write variant: rslora in its place"),
    ("'model.adapter={init: pisa}'", "did you mean pissa?"),
    ("'model.adapter={init: pissa_niter_0}'", "did you mean pissa_niter_1?"),
    ("'model.adapter={adapter_path: a}'", "did you mean path?"),
    ("'model.adapter={additional_target: [lm_head]}'", "did you mean modules_to_save?"),
    ("'model.adapter={path: a, init: gaussian}'", "remove model.adapter.init"),
    ("'model.adapter={alhpa: 16}'", "did you mean alpha?"),
    ("'model.adapter={ontop: true}'", "did you mean on_top?"),
    ("model.adapter=sft/adapter", "write 'model.adapter={path: sft/adapter}'"),
    ("pissa_init=true", "write 'model.adapter={init: pissa_niter_4}'"),
    ("optim.loss_scale=1024", "the loss scale of model.dtype=fp16 is dynamic"),
    ("optim.schedule=inv_sqrt", "did you mean optim.schedule=inverse_sqrt?"),
    ("optim.kind=adamw8bit", "did you mean optim.kind=adamw_8bit?"),
    ("parallelism.ulysses=2", "write parallelism.sequence_parallel=2"),
    ("parallelism.context_parallel=2", "write parallelism.sequence_parallel=2"),
    ("parallelism.expert_parallel=2", "parallelism=zero3 shards weights"),
    ("trainer.ema_rate=0.99", "write trainer.ema_decay=0.99"),
    ("trainer.ema_every=10", "takes in the weights of every step"),
    ("trainer.ema_decay=1", "choose trainer.ema_decay in that range"),
    # Options.
    ("--check=1", "takes no value"),
    ("--multirun", "(one job) for each value"),
    ("--cfg jobb", "write --cfg job"),
    ("--config-dir", "write --config-dir VALUE"),
    ("--config-dir nowhere", "--config-dir is no folder"),
    ("--confg-dir x", "did you mean --config-dir?"),
    ("--config my.yaml", "+experiment=NAME"),
    ("--config-path conf", "--config-dir DIR"),
    ("--config-name mine", "+experiment=NAME"),
    ("--cfg job --resolve", "prints resolved values"),
    ("--dry-run", "--check checks"),
    ("--num_processes 2", "options of the launcher come before -m"),
]


def error_of(typed: str) -> ConfigError:
    try:
        arguments = divide([*RUN, *shlex.split(typed)])
        load_run_config(arguments.overrides, arguments.own_folder)
    except ConfigError as error:
        return error
    raise AssertionError(f"{typed} was accepted")


@pytest.mark.parametrize(("typed", "text"), MISTYPED)
def test_a_mistyped_command_line_gets_a_correction(typed: str, text: str) -> None:
    error = error_of(typed)
    assert text in error.block()
    assert error.remedy
    assert "\n" not in error.message + error.where + error.got + error.expected + error.remedy


@pytest.mark.parametrize(
    ("verb", "typed", "text"),
    [
        ("evaluate", "data=hard.jsonl", "named by 'evaluation.data=[hard.jsonl]'"),
        ("evaluate", "model=output/a/model", "named by evaluation.model=output/a/model"),
        ("compare", "model=output/a", "named by 'compare.models=[output/a]'"),
        ("compare", "data=hard.jsonl", "named by 'data.eval=[hard.jsonl]'"),
        ("evaluate", "checkpoint=best", "evaluation.model of evaluate takes the folder of one"),
        ("evaluate", "evaluation.checkpoint=best", "evaluation.model of evaluate takes the folder of one"),
        ("evaluate", "export.chekpoint=best", "remove it: export reads export.checkpoint"),
        ("compare", "learning_rate=1", "remove it: train reads optim.lr"),
        ("pairs", "learning_rate=1", "remove it: train reads optim.lr"),
        ("pairs", "pairs.rounds=2 learning_rate=1", "write optim.lr=1"),
        ("export", "output=foo", "write export.output=foo"),
        ("train", "output=foo", "write run.dir=foo"),
        ("compare", "reference=none", "compare does not read reference.mode"),
        ("compare", "samples=4", "compare does not read samples"),
        ("train", "evaluation.data.weight=2", "remove it: evaluate reads evaluation.data"),
        ("evaluate", "evaluation.data.weight=2", "write 'evaluation.data=[{path: PATH, weight: 2}]'"),
        ("train", "--seed 42", "did you mean trainer.seed?"),
        ("export", "--output foo", "write export.output=foo"),
        ("compare", "--learning_rate 1", "remove it: train reads optim.lr"),
        ("pairs", "samples=4", "did you mean pairs.samples? train reads samples"),
    ],
)
def test_a_verb_suggests_no_key_that_it_refuses(verb: str, typed: str, text: str) -> None:
    def read(line: list[str]) -> RunConfig:
        return resolve(compose(divide(line, keys_of(verb)).overrides, verb=verb), verb=verb)

    with pytest.raises(ConfigError) as found:
        read([*RUN, *shlex.split(typed)])
    assert text in found.value.block()


@pytest.mark.parametrize("typed", sorted({typed for typed, text in MISTYPED if " write " in f" {text}"}))
def test_the_corrected_line_can_be_parsed(typed: str) -> None:
    written = re.search(r"write (.*?)(, without|: the inner|;|$)", error_of(typed).remedy)
    assert written is not None
    for line in shlex.split(written[1]):
        if "=" in line:
            OverridesParser.create().parse_override(line)


@pytest.mark.parametrize("alias", sorted({**KEY_ALIASES, **REMEDIES}))
def test_every_alias_leads_to_keys_that_exist(alias: str) -> None:
    text = KEY_ALIASES.get(alias) or REMEDIES[alias]
    named = re.findall(rf"\b(?:{SECTIONS})\.[a-z_.]*[a-z]", text)
    files = (".jsonl", ".yaml")
    assert [key for key in named if key not in run_keys() and not key.endswith(files)] == []
    if alias not in key_types(RunConfig):
        assert "there is no key" in error_of(f"{alias}=1").message


def test_aliases_in_a_source_are_names_of_a_source() -> None:
    assert set(SOURCE_ALIASES.values()) <= set(key_types(SourceConfig))
    assert set(SOURCE_ALIASES).isdisjoint(key_types(SourceConfig))


@pytest.mark.parametrize(
    "typed", ["max_stepz=9", "trainer.steps=9", "train_steps=9", "save_steps=9", "trainer.mx=9"]
)
def test_no_guess_ends_a_run_early(typed: str) -> None:
    assert "max_steps?" not in error_of(typed).remedy
    assert "write trainer.max_steps" not in error_of(typed).remedy


def test_options_may_be_anywhere_and_the_last_of_a_key_counts() -> None:
    arguments = divide(["loss=ipo", "--config-dir", ".", "loss=hinge", "trainer.seed=3", "-c=job"])
    assert arguments.overrides == ["loss=ipo", "loss=hinge", "trainer.seed=3"]
    assert arguments.options == {"--config-dir": ".", "--cfg": "job"}
    config = load_run_config([*RUN, *arguments.overrides, "tracking=off", "tracking=wandb", "trainer.seed=4"])
    assert (config.loss.kind, config.tracking.wandb, config.trainer.seed) == ("hinge", "auto", 4)


def test_a_path_without_its_key_gets_the_keys_of_paths(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as found:
        load_run_config([*RUN, str(tmp_path)])
    assert f"run.dir={tmp_path}, " in found.value.block()
