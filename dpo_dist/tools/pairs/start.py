"""Rules for `pairs`, checked before torch is imported and processes join."""

from pathlib import Path

from dpo_dist.data import DataSource, SourceConfig
from dpo_dist.kit import (
    LOSS,
    UNSET,
    Rule,
    RunConfig,
    RunFolder,
    check_rules,
    local_model_folder,
    locate_model,
    needs_of,
    to_unset,
    unused,
)
from dpo_dist.tools.sampling.judge_rules import JUDGES, check_function, count_judges, endpoint_rules
from dpo_dist.tools.sampling.keys import PairsConfig, PairsMethod
from dpo_dist.tools.sampling.rules import SAMPLING_KEYS


def responding_models(pairs: PairsConfig, policy: str) -> list[str]:
    """Return the models that respond: `pairs.models` (a run means its trained model), else the policy."""
    names = pairs.models
    key = "pairs.models"
    runs = {name for name in names if RunFolder(Path(name).expanduser()).config.is_file()}
    return [locate_model(name, key) if name in runs else name for name in names] or [policy]


def _pairs(config: RunConfig) -> PairsConfig:
    return config.section_of(PairsConfig)


def _models(config: RunConfig) -> list[str]:
    return responding_models(_pairs(config), config.model.path)


def _has_one_response(config: RunConfig) -> bool:
    return len(_models(config)) * _pairs(config).samples == 1


_ROUNDS = "pairs.rounds!=0"
_SAMPLES, _RESPONDS = "pairs.method=samples", "pairs.method=samples|delta"
_EFFECTS = {
    _RESPONDS: "models unfinished part",
    _SAMPLES: "samples reward_model function endpoint.url",
    "pairs.method=samples|scores": "select margin",
    _ROUNDS: "reference",
}
_NO_ROUNDS = "rounds cannot be done with this setting"
_RULES = (
    *(unused(f"pairs.{name}", unless) for unless, names in _EFFECTS.items() for name in names.split()),
    *(unused(name, _RESPONDS) for name in (*SAMPLING_KEYS, "sampling.endpoint.url")),
    *endpoint_rules(lambda c: len(_models(c))),
    Rule(
        "run.resume!=auto",
        "run.resume has no effect on pairs: finished parts are always used again",
        to_unset("run.resume"),
    ),
    Rule(
        "data.train",
        "a source's weight has no effect on pairs",
        "remove it, and set it in the training that reads the pairs",
        lambda c: any(source.weight != SourceConfig.weight for source in c.data.train),
    ),
    Rule(
        "pairs.part",
        "the prompts have no part with this number",
        "set pairs.part=1/N to pairs.part=N/N, for N parts",
        lambda c: _pairs(c).share[0] >= _pairs(c).share[1],
    ),
    Rule(
        f"sampling.temperature=0 pairs.samples {_SAMPLES}",
        "without a temperature every sample of a model is the same",
        "raise sampling.temperature, or set pairs.samples=1",
        lambda c: _pairs(c).samples > 1,
    ),
    Rule(
        f"pairs.models {_RESPONDS}",
        "no model responds to the prompts",
        "set pairs.models=[MODEL], or model.path",
        lambda c: UNSET in _models(c),
    ),
    Rule(
        f"model.revision!=null {_RESPONDS}",
        "model.revision has no effect if model.path is not among pairs.models",
        to_unset("model.revision"),
        lambda c: c.model.path not in _models(c),
    ),
    Rule(
        "pairs.models pairs.method=delta",
        "delta pairs need two models",
        "set pairs.models=[STRONGER,WEAKER]",
        lambda c: (
            len(_pairs(c).models) != 2
            or len({Path(name).expanduser().resolve() for name in _pairs(c).models}) < 2
        ),
    ),
    Rule(
        f"pairs.samples {_SAMPLES}",
        "a pair needs two responses",
        "raise pairs.samples, or name two pairs.models; one response alone needs no judge",
        lambda c: _has_one_response(c) and count_judges(_pairs(c)) > 0,
    ),
    Rule(
        f"{JUDGES} {_SAMPLES}",
        "samples need one judge",
        "set one of them; pairs.method=delta needs no judge",
        lambda c: count_judges(_pairs(c)) != 1 and not _has_one_response(c),
    ),
    Rule(
        f"pairs.samples {_SAMPLES} {_ROUNDS} {LOSS}",
        "a response without a judge makes no pair, which this loss needs",
        "raise pairs.samples and set a judge, or choose a loss of one response: reverse_kl, distill, sft",
        lambda c: _has_one_response(c) and not c.loss.is_one_sided,
    ),
    Rule(f"pairs.method!=samples {_ROUNDS}", _NO_ROUNDS, "set pairs.method=samples"),
    Rule(f"pairs.models!=[] {_ROUNDS}", _NO_ROUNDS, "name the first policy by model.path"),
)


def check_pairs(config: RunConfig) -> None:
    """Check everything that needs no torch, network or other processes; raises DpoDistError."""
    pairs = _pairs(config)
    check_rules(config, needs_of("pairs"))
    check_rules(config, _RULES)
    if pairs.method in (PairsMethod.samples, PairsMethod.delta):
        key = "pairs.models" if pairs.models else "model.path"
        for name in _models(config):
            local_model_folder(name, None, key, accepts_adapter=True)
    check_function(pairs)
    for source in config.data.train:
        DataSource(source).check(of_prompts=pairs.method is not PairsMethod.scores)


_RULES_OF_EVERY_VERB = [
    Rule(
        "model.adapter.path!=null pairs.rounds!=0",
        "each round merges its adapter into the model, so that the next one has no adapter to continue",
        "merge the adapter of model.adapter.path into its base, and set model.path to the result",
    ),
    Rule(
        f"pairs.rounds!=0 {LOSS}",
        "each round trains the model that responds, and a reward model gives no responses",
        "train the reward model first, and name it in pairs.reward_model",
        lambda c: c.loss.of_scores,
    ),
]


def rules_of_verb(_verb: str) -> list[Rule]:
    """Return the rules, which are the same for every verb."""
    return _RULES_OF_EVERY_VERB
