"""Values out of bounds, and values that contradict each other, are an error with a remedy (law L5)."""

import contextlib
import shlex
from functools import partial
from pathlib import Path

import pytest

from dpo_dist.config import load
from dpo_dist.config.keys import group_folders, preset_names
from dpo_dist.config.losses import LossKind
from dpo_dist.config.rules import best_direction, rules_of, unused
from dpo_dist.config.schema import AdapterConfig
from dpo_dist.data.config import SourceConfig
from dpo_dist.foundation.errors import ConfigError
from dpo_dist.foundation.fields import as_written
from tests.unit.config.support import RUN, configured, error_of

LIVE = "reference.mode=live"
EVERY = "loss.sync_reference.every=2"
NF4 = "model.adapter.r=8 model.quantization=nf4 parallelism.kind=ddp"
EVALUATED = "data.eval_share=0.1 trainer.eval_every=10"
TERMS = "loss.terms=[{kind:sigmoid},{kind:%s}]"

# The words of a command, and the first key that the error names.
REFUSED = [
    ("run.after_checkpoint=***", "run.after_checkpoint"),
    ("model.dtype=fp32 model.attention=varlen", "model.attention"),
    ("model.activation_offload=true", "model.activation_offload"),
    ("model.tiled_mlp=true", "model.tiled_mlp"),
    ("model.tiled_mlp=true model.gradient_checkpointing=full model.fused=compile", "model.fused"),
    ("parallelism=zero2 parallelism.shard_size=8", "parallelism.shard_size"),
    ("parallelism=zero2 parallelism.experts=2", "parallelism.experts"),
    ("parallelism.experts=4 parallelism.shard_size=2", "parallelism.experts"),
    (f"parallelism.experts=2 {LIVE} {EVERY}", "parallelism.experts"),
    ("parallelism.shard_size=8 parallelism.offload_optimizer=cpu", "parallelism.shard_size"),
    ("trainer.deterministic=true model.fused=liger", "trainer.deterministic"),
    ("loss.router.aux_coefficient=0.1 model.fused=compile", "model.fused"),
    ("loss.router.aux_coefficient=0.1 model.fused=compile", "model.fused"),
    (f"{NF4} model.fused=compile", "model.fused"),
    ("reference.quantization=nf4 model.fused=compile", "model.fused"),
    (
        "model.adapter.modules_to_save=[norm,q_proj] model.adapter.target_modules=[q_proj]",
        "model.adapter.modules_to_save",
    ),
    ("model.adapter.path=sft pairs.rounds=2", "model.adapter.path"),
    ("model.quantization=int8 parallelism=ddp loss=sft", "model.quantization"),
    (f"{NF4} parallelism.kind=zero2", "model.quantization"),
    (f"{NF4} model.adapter.variant=dora model.quantization=int8", "model.adapter.variant"),
    ("model.images.train=none parallelism.sequence_parallel=2", "model.images"),
    ("model.images.train=projector model.adapter.r=8", "model.images.train"),
    ("model.images={train:tower} model.adapter.r=8", "model.images.train"),
    ("model.images.max_pixels=0", "model.images.max_pixels"),
    ("data.train=[a,{path:a,weight:2}]", "data.train"),
    ("data.eval=[b,b]", "data.eval"),
    ("data.eval=[{path:b,weight:2}]", "data.eval"),
    ("evaluation.data=[b,b]", "evaluation.data"),
    ("evaluation.data=[{path:b,weight:2}]", "evaluation.data"),
    ("data.eval=[b] data.eval_share=0.1", "data.eval_share"),
    ("data.eval_share=0.1 data.drop_eval_prompts=true", "data.drop_eval_prompts"),
    ("data.train=[{path:a,images:pictures}]", "data.train"),
    ("data.eval=[{path:a,images:pictures}]", "data.eval"),
    ("evaluation.data=[{path:a,images:pictures}]", "evaluation.data"),
    ("data.max_prompt_length=64 data.max_length=64", "data.max_prompt_length"),
    (TERMS % "sigmoid", "loss.terms"),
    ("loss.terms=[{kind:sigmoid}] loss.kind=ipo", "loss.kind"),
    ("loss.terms=[{kind:reward},{kind:sft}]", "loss.terms"),
    ("loss=reward pairs.rounds=2", "pairs.rounds"),
    ("loss=reward model.images.train=none", "model.images"),
    ("loss=reward data.untrained=[thoughts]", "data.untrained"),
    ("loss=reward data.untrained=[]", "data.untrained"),
    ("loss=reward loss.beta=0.2", "loss.beta"),
    ("loss=reward data.eval=[b] sampling.prompts=4", "sampling.prompts"),
    ("loss=reward reference=cached", "reference.mode"),
    (f"{TERMS % 'nca_pair'} loss.divergence=js", "loss.divergence"),
    (f"{TERMS % 'aot'} loss.weighting=wpo", "loss.weighting"),
    ("loss.options.gamma=1", "loss.options.gamma"),
    ("loss=custom run.dir=here", "loss.function"),
    ("loss.divergence=js loss.alpha_coefficient=0.3", "loss.alpha_coefficient"),
    ("loss=exo_pair loss.label_smoothing=0", "loss.label_smoothing"),
    ("optim=adamw_bf16 parallelism.offload_optimizer=cpu", "optim.kind"),
    ("optim=adamw_bf16 parallelism.offload_parameters=cpu", "optim.kind"),
    ("optim=adamw_bf16 parallelism=zero3_offload", "optim.kind"),
    ("optim=adamw_bf16 model.dtype=fp32", "optim.kind"),
    ("optim=adamw_bf16 parallelism=ddp optim.sums=fp32", "optim.sums"),
    ("optim.sums=bf16", "optim.sums"),
    ("optim.warmup=2.5", "optim.warmup"),
    ("optim.min_lr_ratio=0.1 optim.schedule=constant", "optim.min_lr_ratio"),
    ("trainer.ema_decay=0.9 trainer.keep_last=0", "trainer.ema_decay"),
    ("trainer.eval_every=10", "trainer.eval_every"),
    ("sampling.prompts=4", "sampling.prompts"),
    ("sampling.temperature=0 sampling.top_p=0.5", "sampling.top_p"),
    ("sampling.temperature=0 sampling.top_k=5", "sampling.top_k"),
    ("trainer.eval_every=5 sampling.prompts=0", "trainer.eval_every"),
    ("trainer.keep_best=eval_loss", "trainer.keep_best"),
    ("trainer.patience=3", "trainer.patience"),
    ("trainer.keep_best=eval_loss data.eval_share=0.1", "trainer.keep_best"),
    (f"{EVALUATED} trainer.keep_best=loss", "trainer.keep_best"),
    (f"{EVALUATED} trainer.keep_best=eval_logps/chosen", "trainer.keep_best"),
    ("sweep.part=4/3", "sweep.part"),
    ("parallelism=zero2 parallelism.offload_parameters=cpu", "parallelism.offload_parameters"),
    ("parallelism=ddp parallelism.offload_optimizer=cpu", "parallelism.offload_optimizer"),
    ("export.merge=true", "export.merge"),
    ("export.weights=ema", "export.weights"),
    ("reference=none loss=kto", "reference.mode"),
    ("loss=simpo reference.mode=cached", "reference.mode"),
    ("loss=sft reference.offload=cpu", "reference.offload"),
    ("loss=sft reference.quantization=int8", "reference.quantization"),
    ("reference=adapter", "reference.mode"),
    ("reference=adapter model.adapter.r=8 reference.path=other", "reference.path"),
    ("reference=adapter model.adapter.r=8 reference.quantization=nf4", "reference.quantization"),
    ("reference=adapter model.adapter.r=8 reference.offload=cpu", "reference.offload"),
    ("loss=simpo reference.path=other", "reference.path"),
    (f"{NF4} {LIVE}", "reference.quantization"),
    ("reference.quantization=int8 reference.offload=cpu", "reference.quantization"),
    (f"{LIVE} loss.sync_reference.mixup=0.5", "loss.sync_reference.mixup"),
    (EVERY, "loss.sync_reference.every"),
    (f"{LIVE} {EVERY} reference.quantization=nf4", "loss.sync_reference.every"),
    (f"{LIVE} {EVERY} model.adapter.r=8", "loss.sync_reference.every"),
    ("loss=distill", "teacher.path"),
    ("teacher.path=other", "teacher.path"),
    ("teacher.mode=live", "teacher.mode"),
    ("teacher.k=9", "teacher.k"),
    ("teacher.offload=cpu", "teacher.offload"),
    ("teacher.system=sea", "teacher.system"),
    (f"teacher.digest={'ab' * 16}", "teacher.digest"),
    (f"loss=distill teacher.path=t teacher.mode=live teacher.digest={'ab' * 16}", "teacher.digest"),
    ("loss=distill teacher.path=t teacher.digest=abc", "teacher.digest"),
    ("loss=distill teacher.path=t teacher.mode=live reference.accept=rounding", "reference.accept"),
    ("loss=simpo reference.accept=rounding", "reference.accept"),
    ("loss=reverse_kl reference=none", "reference.mode"),
    ("loss=distill teacher.path=other teacher.mode=policy", "teacher.path"),
    ("loss=distill teacher.mode=adapter", "teacher.mode"),
    ("loss=distill loss.options.mix=0.5 teacher.path=t", "teacher.mode"),
    ("loss=distill loss.options.mix=1 teacher.path=t teacher.mode=live teacher.k=9", "teacher.k"),
    ("loss=simpo reference.system=sea", "reference.system"),
    ("loss=distill teacher.mode=policy teacher.offload=cpu", "teacher.offload"),
    ("'loss.terms=[{kind:distill},{kind:kto}]' teacher.path=t", "loss.terms"),
    ("'loss.terms=[{kind:kto},{kind:sft}]'", "loss.terms"),
    # Forms of single values.
    ("run.name=a/b", "run.name"),
    ("run.name=..", "run.name"),
    ("model.gradient_checkpointing=1", "model.gradient_checkpointing"),
    ("optim.betas=[0.9]", "optim.betas"),
    ("model.adapter.target_modules=[]", "model.adapter.target_modules"),
    ("data.untrained=[thoughts,notes]", "data.untrained[1]"),
    ("parallelism.offload_parameters=nvme", "parallelism.offload_parameters"),
    ("data.train=[a,{path:b,label:a/b}]", "data.train[1].label"),
    ("model.path=", "model.path"),
    # Bounds inside of lists and mappings, and numbers that are none.
    ("data.eval=[a,{path:b,limit:0}]", "data.eval[1].limit"),
    ("data.train=[a,{path:b,weight:1e18}]", "data.train[1].weight"),
    ("model.adapter={alpha:0}", "model.adapter.alpha"),
    ("optim.lr=inf", "optim.lr"),
]


@pytest.mark.parametrize(("typed", "key"), REFUSED)
def test_refused(typed: str, key: str) -> None:
    error = error_of(typed)
    if error.message.endswith("cannot have this value"):
        assert error.where.startswith("command line: ")
        assert error.message.split()[0] == key
    else:
        assert error.where.removeprefix("command line: ").replace("=", ",").split(",")[0] == key


def test_quantization_without_an_adapter_is_one_mistake() -> None:
    assert "mistakes" not in str(error_of("model.quantization=nf4 parallelism.kind=ddp"))


@pytest.mark.slow
def test_every_rule_has_a_case(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the rules about an option that a loss lacks, one for each option, one case is enough."""
    monkeypatch.setattr(load, "check_rules", lambda *_: None)
    configurations = []
    for typed, _ in REFUSED:
        with contextlib.suppress(ConfigError):  # refused by the schema
            configurations.append(configured(typed))
    unbroken = [rule for rule in rules_of("") if not any(map(rule.is_broken, configurations))]
    assert [rule.when for rule in unbroken if not rule.why.endswith("with this loss")] == []


@pytest.mark.parametrize(
    "typed",
    [
        "model.gradient_checkpointing=full model.fused=compile",
        "model.gradient_checkpointing=2 model.fused=liger",
        "data.train=[{path:a,fields:pair},b] data.ranked=all_pairs",
        "loss=robust loss.label_smoothing=0.49",
        "loss=exo_pair optim.warmup=10 optim.schedule=constant",
        "loss.terms=[{kind:ipo,weight:0},{kind:sft,weight:-0.1}] loss.kind=ipo",
        f"{TERMS % 'sft'} loss.divergence=js",
        "loss=ipo loss.divergence=alpha loss.alpha_coefficient=0.3",
        "loss=beta_dpo loss.weighting=wpo loss.ld_alpha=0.2",
        "data.max_prompt_length=63 data.max_length=64 data.untrained=[formatting,thoughts]",
        "'data.train=[{path:b,label:\"math_2.1+数学-x\"}]'",
        "model.images.train=none model.images.max_pixels=50176 model.adapter.r=8",
        f"{NF4} model.images={{}} reference=adapter",
        "parallelism=zero2 parallelism.offload_optimizer=cpu",
        "parallelism.offload_parameters=cpu parallelism.offload_optimizer=cpu",
        "parallelism.shard_size=8 parallelism.offload_parameters=cpu",
        f"{NF4} parallelism.experts=2",
        "trainer.eval_every=10 sampling.prompts=4 data.eval_share=0.1",
        "sampling.max_new_tokens=9 sampling.top_p=0.5 sampling.top_k=5",
        "sampling.prompts=0",
        "data.eval=[b.jsonl] data.drop_eval_prompts=true optim.min_lr_ratio=0.1 optim.schedule=linear",
        "optim.warmup=10 trainer.max_steps=10",
        "optim.betas=[0.0,0.999] optim.warmup=0.99 data.max_bad_share=1.0",
        f"{NF4} reference.mode=cached reference.quantization=nf4",
        f"{LIVE} {EVERY} loss.sync_reference.mixup=1 reference.offload=cpu",
    ],
)
def test_accepted(typed: str) -> None:
    configured(typed)


def test_options_of_a_file_are_reset_by_the_key_of_the_command_that_they_need(tmp_path: Path) -> None:
    """A whole file of its own is still refused, and so is an option beside it in the command."""
    (file := tmp_path / "my.yaml").write_text(
        "sampling: {prompts: 4, max_new_tokens: 9}\ndata.eval_share: 0.1"
    )
    with_file = partial(configured, verb="train", run=[*RUN, str(file)])
    refused = partial(error_of, verb="train", run=[*RUN, str(file)])
    assert with_file("sampling.prompts=2").sampling.max_new_tokens == 9
    assert with_file("sampling.prompts=0") == configured("data.eval_share=0.1 sampling.prompts=0")
    assert "sampling.max_new_tokens" in refused("sampling.prompts=0 sampling.max_new_tokens=9").where
    file.write_text("sampling: {max_new_tokens: 9}")
    assert "sampling.max_new_tokens" in refused("").where


def test_a_reward_model_draws_no_responses() -> None:
    refused = error_of("loss=reward data.eval=[b] sampling.temperature=0.5", verb="train")
    assert refused.where == "sampling.temperature, loss.kind"
    assert configured("loss=reward data.eval=[b] sampling.prompts=0", verb="train").loss.of_scores


@pytest.mark.slow
def test_each_preset_of_data_takes_the_place_of_the_data_of_every_experiment() -> None:
    presets, experiments = (preset_names(group, group_folders()) for group in ("data", "experiment"))
    tried = [(presets[0], each) for each in experiments] + [(each, experiments[0]) for each in presets[1:]]
    for preset, experiment in tried:
        config = configured(f"+experiment={experiment} data={preset}", verb="train", run=["model.path=m"])
        assert config.data.eval
        assert config.data.eval_share == 0


def test_evaluations_of_a_file_end_with_their_data(tmp_path: Path) -> None:
    (file := tmp_path / "my.yaml").write_text(
        "data.eval_share: 0.1\nsampling.prompts: 4\n"
        "trainer: {eval_every: 5, keep_best: eval_loss, patience: 2}"
    )
    without = configured("data.eval_share=0", verb="train", run=[*RUN, str(file)])
    assert without == configured("sampling.prompts=null", verb="train")


def test_a_preset_resets_the_same_options_as_its_keys(tmp_path: Path) -> None:
    (file := tmp_path / "my.yaml").write_text("parallelism: {offload_parameters: cpu}")
    by_key, by_preset = (
        configured(f"{word}=ddp", run=[*RUN, str(file)]) for word in ("parallelism.kind", "parallelism")
    )
    assert by_preset == by_key


def test_a_key_that_no_word_sets_is_written_with_its_default_in_place_of_removed(tmp_path: Path) -> None:
    (file := tmp_path / "my.yaml").write_text("loss: sft\nloss.divergence: js\ndata.eval_share: 0.1")
    run = [*RUN, str(file)]
    remedy = error_of("data.eval=[b] loss.ld_alpha=0.5", run=run).remedy
    assert "remove loss.divergence (if a file sets it, write loss.divergence=reverse_kl)" in remedy
    assert "remove loss.ld_alpha (" in remedy
    configured("data.eval=[b] loss.divergence=reverse_kl", run=run)
    words = ["loss=simpo", "reference={offload: cpu}"]
    assert "write reference.offload=none)" in error_of(shlex.join(words)).remedy
    configured(shlex.join([*words, "reference.offload=none"]))


def test_an_option_of_a_file_that_the_loss_of_the_command_lacks_can_be_taken_away(tmp_path: Path) -> None:
    (file := tmp_path / "my.yaml").write_text("loss: {kind: simpo, options: {gamma: 1}}")
    run = [*RUN, str(file)]
    assert error_of("loss.kind=ipo", run=run).where == f"{file}:1"
    assert configured("loss.kind=ipo loss.options=null", run=run) == configured("loss.kind=ipo")


@pytest.mark.parametrize("setting", ["max_new_tokens=9", "temperature=0", "top_p=0.5", "top_k=5"])
def test_sampling_needs_a_verb_that_samples_or_samples_at_evaluations(setting: str) -> None:
    typed, key = f"sampling.{setting}", f"sampling.{setting.partition('=')[0]}"
    for verb in ("train", "evaluate"):
        for without in ("", "data.eval_share=0.1 sampling.prompts=0"):
            assert key in error_of(f"{typed} {without}", verb=verb).where
        configured(f"{typed} data.eval_share=0.1", verb=verb)
    configured(typed, verb="pairs")
    configured(typed, verb="compare", run=["compare.models=[a,b]", "data.eval=[b.jsonl]"])


@pytest.mark.parametrize("others", ["pairs: {method: samples}", "compare: {models: [a, b]}"])
def test_a_file_with_sampling_for_pairs_or_a_comparison_serves_other_verbs_too(
    others: str, tmp_path: Path
) -> None:
    (file := tmp_path / "my.yaml").write_text(f"{others}\nsampling: {{max_new_tokens: 9}}\n")
    for verb in ("train", "plan", "doctor", "precompute"):
        for typed in ("", "data.eval_share=0.1 sampling.prompts=0"):
            assert configured(typed, verb=verb, run=[*RUN, str(file)]).sampling.max_new_tokens == 9
    assert configured("+experiment=demo_rounds", verb="plan", run=[]).sampling.max_new_tokens == 32


def test_values_are_shown_as_a_user_writes_them() -> None:
    source = SourceConfig("a", limit=3, images="p", label="x")  # the last two do not define the result
    values = [None, True, 0.10, LossKind.ipo, "", source, AdapterConfig(r=8)]
    written = "[null, true, 0.1, ipo, '', {path: a, limit: 3, images: p, label: x}, {r: 8}]"
    assert as_written(values) == written
    assert as_written([1e-6, 2.0, 0.12345678, 0.9999999]) == "[1e-06, 2, 0.12345678, 0.9999999]"


@pytest.mark.parametrize(
    "text",
    ["a.jsonl", "my file.json", "~/é", "train[:9%]", "a,b", "x: y", "null", "True", "1e5", "12", '"q"', "#"],
)
def test_texts_are_shown_so_that_a_command_reads_them(text: str) -> None:
    config = load.load_run_config(["model.path=m", f"data.train={as_written([SourceConfig(text)])}"])
    assert [source.path for source in config.data.train] == [text]


@pytest.mark.parametrize(
    ("metrics", "best"),
    [
        ("loss loss/web loss/excess distance/chosen distance/rejected rewards/both_fall", "lowest"),
        ("rewards/accuracies rewards/accuracies/web rewards/margins rewards/chosen", "highest"),
        ("rewards/rejected logps/chosen tokens/chosen loss/kl loss/kl/web entropy/chosen", None),
    ],
)
def test_the_best_checkpoint_has_the_values_that_are_best_of_its_metric(
    metrics: str, best: str | None
) -> None:
    for metric in metrics.split():
        assert best_direction(f"eval_{metric}") == best, metric


def test_the_remedy_for_a_key_that_must_have_a_value_can_be_typed() -> None:
    rule = unused("sampling.endpoint.model", unless="sampling.endpoint.url!=null")
    assert "remove sampling.endpoint.model" in str(rule.remedy)
    assert "or set sampling.endpoint.url=..." in str(rule.remedy)
