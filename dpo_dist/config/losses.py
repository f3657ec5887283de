"""The keys of `loss`, with the options and facts of each kind."""

from collections.abc import Iterable
from dataclasses import dataclass, is_dataclass
from enum import StrEnum
from inspect import signature
from typing import Annotated, Any, ClassVar, Literal, TypeAlias, TypeVar

from pydantic import BeforeValidator, Field, TypeAdapter, ValidationInfo
from pydantic_core import PydanticCustomError

from dpo_dist.data import NUMBERS
from dpo_dist.foundation.fields import as_entry, key, schema, schema_fields, section, validated
from dpo_dist.foundation.user_code import user_function

T = TypeVar("T")

MODEL_COEFFICIENT = "model"
"""The value of `loss.router.aux_coefficient` for the coefficient in the model's config.json."""


@schema
class RouterConfig:
    """The loss of the routers of a mixture of experts, which training adds to that of each global batch."""

    aux_coefficient: Literal["model"] | Annotated[float, Field(gt=0)] | None = key(
        None, accepts="model, a number above 0, or null"
    )
    """Weight of the load-balancing loss; `model`: `router_aux_loss_coef` of the model; null: none."""


LossKind = StrEnum(
    "LossKind",
    "sigmoid robust hinge ipo sigmoid_norm exo_pair nca_pair bco_pair sppo_hard apo_zero apo_down "
    "discopop dpop odpo reward_aware simpo orpo cpo sft distill reverse_kl aot aot_unpaired beta_dpo "
    "plackett_luce kto apo_zero_unpaired reward custom",
)
"""Names of `loss.kind`."""
Divergence = StrEnum("Divergence", ["reverse_kl", "forward_kl", "js", "alpha"])
"""f-divergence from the reference model (arXiv 2309.16240)."""
Weighting = StrEnum("Weighting", ["none", "wpo"])
"""Weight of each pair's loss."""


# The options of each kind of loss: `loss.options`.
BcoDelta = StrEnum("BcoDelta", ["zero", "running_mean"])
"""Reward shift of `bco_pair`."""


@schema
class IpoOptions:
    """Options of `ipo`."""

    length_average: bool = key(True)
    """`ipo`: divide log-ratios by the response's tokens."""


@schema
class BcoPairOptions:
    """Options of `bco_pair`."""

    delta: BcoDelta = key(BcoDelta.zero)
    """`bco_pair`: reward shift."""


@schema
class DiscopopOptions:
    """Options of `discopop`."""

    # Above 1 the loss of a pair that is ranked wrongly grows like exp(-b h).
    tau: float = key(0.05, gt=0, le=1)
    """`discopop`: temperature of the blend of its two losses."""


@schema
class DpopOptions:
    """Options of `dpop`."""

    penalty_weight: float = key(50.0, ge=0)
    """`dpop`: weight of the penalty for a chosen response less likely than under the reference."""


@schema
class OdpoOptions:
    """Options of `odpo`."""

    alpha: float = key(1.0, ge=0)
    """`odpo`: weight of the score gap's logarithm."""


@schema
class RewardAwareOptions:
    """Options of `reward_aware`."""

    scale: float = key(1.0, gt=0)
    """`reward_aware`: factor of the score gap in the target probability."""


@schema
class SimpoOptions:
    """Options of `simpo`."""

    gamma: float = key(0.5, ge=0)
    """`simpo`: target margin."""


@schema
class OrpoOptions:
    """Options of `orpo`."""

    odds_weight: float = key(0.1, ge=0)
    """`orpo`: weight of the odds-ratio term, lambda of the paper."""


@schema
class CpoOptions:
    """Options of `cpo`."""

    nll_weight: float = key(1.0, ge=0)
    """`cpo`: weight of the chosen response's mean negative log-prob."""


@schema
class DistillOptions:
    """Options of `distill`."""

    temperature: float = key(1.0, gt=0)
    """`distill`: temperature of the softmax of teacher and policy."""
    mix: float = key(0.0, ge=0, le=1)
    """`distill`: 0: KL(teacher, policy), 1: KL(policy, teacher), between: a Jensen-Shannon divergence."""


@schema
class BetaDpoOptions:
    """Options of `beta_dpo`."""

    alpha: float = key(0.6, ge=0)
    """`beta_dpo`: how much beta follows the batch's margin."""
    momentum: float = key(0.9, ge=0, lt=1)
    """`beta_dpo`: momentum of the moving average of margins."""


@schema
class RewardOptions:
    """Options of `reward`."""

    centre: float = key(0.0, ge=0)
    """`reward`: weight of the squared sum of scores, which keeps their mean near 0."""


@dataclass(frozen=True)
class KindFacts:
    """Facts of one kind of loss; formulas in the notation of docs/losses.md."""

    formula: str
    source: str
    uses: frozenset[str]
    """The fields of `LossConfig` that the formula depends on, besides `options`."""
    numbers: frozenset[str] = frozenset({"loss_weight"})
    """Those of `NUMBERS` that the formula takes."""
    options: type[Any] | None = None
    """The class of `loss.options`; None: the kind has no options."""
    needs_reference: bool = True
    needs_teacher: bool = False
    fewest_responses: int = 2
    accepts_rankings: bool = False
    needs_scores: bool = False
    """The chosen response must have a higher score than the rejected one."""
    is_unpaired: bool = False
    """A record has one response, labelled as good or bad."""
    needs_partners: bool = False
    """A response to another prompt is scored beside that of each record."""
    is_coupled: bool = False
    """The loss of a pair depends on the other pairs of its global batch."""
    length_averaged: bool = False
    """Rewards without a reference are means over tokens."""
    smoothing: float = 0.0
    """The default of `label_smoothing`."""
    smoothing_above_0: bool = False
    of_scores: bool = False
    """The model is a reward model: a response has a score in place of a log-prob."""


_PAIR = frozenset({"beta", "ld_alpha", "weighting"})
_MARGIN = _PAIR | {"divergence"}
_WITH_MARGIN = frozenset({"loss_weight", "margin"})
_WITH_SOFT_LABEL = frozenset({"loss_weight", "soft_label"})
_LABELLED = frozenset({"beta", "desirable_weight", "undesirable_weight"})

KINDS: dict[LossKind, KindFacts] = {
    LossKind.sigmoid: KindFacts(
        "-(1-e) ls(b h) - e ls(-b h)",
        "DPO, arXiv 2305.18290; with label smoothing: conservative DPO (Mitchell)",
        _MARGIN | {"label_smoothing"},
        frozenset(NUMBERS),
    ),
    LossKind.robust: KindFacts(
        "(-(1-e) ls(b h) + e ls(-b h)) / (1 - 2e)",
        "robust DPO, arXiv 2403.00409",
        _MARGIN | {"label_smoothing"},
    ),
    LossKind.hinge: KindFacts(
        "max(0, 1 - b h)", "SLiC, arXiv 2305.10425; RSO, arXiv 2309.06657", _MARGIN, _WITH_MARGIN
    ),
    LossKind.ipo: KindFacts(
        "(Sw/nw - Sl/nl - 1/(2b))^2; with `loss.options.length_average=false` (h - 1/(2b))^2",
        "IPO, arXiv 2310.12036",
        _MARGIN,
        options=IpoOptions,
    ),
    LossKind.sigmoid_norm: KindFacts("-ls(b (Sw/nw - Sl/nl))", "Tulu 3, arXiv 2411.15124", _MARGIN),
    LossKind.exo_pair: KindFacts(
        "s(b h) (ls(b h) - log(1-e)) + s(-b h) (ls(-b h) - log e), 0 < e < 0.5, null: 1e-3",
        "EXO, arXiv 2402.00856",
        _MARGIN | {"label_smoothing"},
        _WITH_SOFT_LABEL,
        smoothing=1e-3,
        smoothing_above_0=True,
    ),
    LossKind.nca_pair: KindFacts("-ls(b Dw) - ls(-b Dw) / 2 - ls(-b Dl) / 2", "NCA, arXiv 2402.05369", _PAIR),
    LossKind.bco_pair: KindFacts(
        "-ls(b Dw - d) - ls(-(b Dl - d)); d = 0, with `loss.options.delta=running_mean` "
        "the mean reward so far",
        "BCO, arXiv 2404.04656",
        _PAIR,
        options=BcoPairOptions,
    ),
    LossKind.sppo_hard: KindFacts("(Dw - 1/(2b))^2 + (Dl + 1/(2b))^2", "SPPO, arXiv 2405.00675", _PAIR),
    LossKind.apo_zero: KindFacts("1 - s(b Dw) + s(b Dl)", "APO, arXiv 2408.06266", _PAIR),
    LossKind.apo_down: KindFacts("s(b Dw) + 1 - s(b (Dw - Dl))", "APO, arXiv 2408.06266", _PAIR),
    LossKind.discopop: KindFacts(
        "-(1-m) ls(b h) + m exp(-b h), m = s(b h / t), t = `loss.options.tau`",
        "DiscoPOP, arXiv 2406.08414",
        _MARGIN,
        options=DiscopopOptions,
    ),
    LossKind.dpop: KindFacts(
        "-ls(b (h - l max(0, -Dw))), l = `loss.options.penalty_weight`",
        "DPO-positive, arXiv 2402.13228",
        _MARGIN,
        options=DpopOptions,
    ),
    LossKind.odpo: KindFacts(
        "-ls(b h - a log(score_w - score_l)), a = `loss.options.alpha`; needs scored pairs",
        "DPO with an offset, arXiv 2402.10571",
        _MARGIN,
        _WITH_MARGIN,
        OdpoOptions,
        needs_scores=True,
    ),
    LossKind.reward_aware: KindFacts(
        "-p (ls(b h) - log p) - (1-p) (ls(-b h) - log(1-p)), p = s(c (score_w - score_l)), "
        "c = `loss.options.scale`; needs scored pairs",
        "reward-aware preference optimization of Nemotron-4 340B, arXiv 2406.11704",
        _MARGIN,
        options=RewardAwareOptions,
        needs_scores=True,
    ),
    LossKind.simpo: KindFacts(
        "-ls(b (pw/nw - pl/nl) - g), g = `loss.options.gamma`",
        "SimPO, arXiv 2405.14734",
        frozenset({"beta", "ld_alpha", "weighting"}),
        _WITH_MARGIN,
        SimpoOptions,
        needs_reference=False,
        length_averaged=True,
    ),
    LossKind.orpo: KindFacts(
        "-pw/nw - c ls(log odds(w) - log odds(l)), odds = P/(1-P), log P = p/n, "
        "c = `loss.options.odds_weight`",
        "ORPO, arXiv 2403.07691",
        frozenset({"ld_alpha", "weighting"}),
        options=OrpoOptions,
        needs_reference=False,
        length_averaged=True,
    ),
    LossKind.cpo: KindFacts(
        "-ls(b (pw - pl)) - c pw/nw, c = `loss.options.nll_weight`",
        "CPO, arXiv 2401.08417",
        frozenset({"beta", "ld_alpha", "weighting"}),
        _WITH_MARGIN,
        CpoOptions,
        needs_reference=False,
    ),
    LossKind.sft: KindFacts(
        "-pw / (mean nw of the global batch): a token mean over that batch",
        "supervised fine-tuning",
        frozenset(),
        needs_reference=False,
        fewest_responses=1,
        accepts_rankings=True,
        length_averaged=True,
    ),
    LossKind.distill: KindFacts(
        "KL(teacher, policy) or by `loss.options.mix` [another](reward_models.md#a-teacher), at "
        "`loss.options.temperature`, summed over tokens / (mean nw of the global batch)",
        "knowledge distillation, arXiv 1503.02531; a sparse teacher, arXiv 2503.16870; GKD, arXiv 2306.13649",
        frozenset(),
        options=DistillOptions,
        needs_reference=False,
        needs_teacher=True,
        fewest_responses=1,
        accepts_rankings=True,
        length_averaged=True,
    ),
    LossKind.reverse_kl: KindFacts(
        "(log p - log q)^2 / 2 summed over tokens, q the reference's, / (mean nw of the global batch): "
        "for [the policy's own samples](reward_models.md#on-policy-distillation)",
        "on-policy distillation, arXiv 2306.13649; this estimate: k2 of Schulman",
        frozenset(),
        fewest_responses=1,
        accepts_rankings=True,
    ),
    LossKind.aot: KindFacts(
        "pw - pl and rw - rl each sorted over the global batch, D their difference: "
        "-(1-e) ls(b D) - e ls(-b D)",
        "AOT, arXiv 2406.05882",
        frozenset({"beta", "ld_alpha", "label_smoothing"}),
        frozenset(),
        is_coupled=True,
    ),
    LossKind.aot_unpaired: KindFacts(
        "the same with D = sorted Dw - sorted Dl",
        "AOT, arXiv 2406.05882",
        frozenset({"beta", "ld_alpha", "label_smoothing"}),
        frozenset(),
        is_coupled=True,
    ),
    LossKind.beta_dpo: KindFacts(
        "`sigmoid` with b' = b (1 + a (M - M0)), M the mean of b h over the global batch, "
        "M0 a moving average of M, a = `loss.options.alpha`",
        "beta-DPO, arXiv 2407.08639",
        _MARGIN | {"label_smoothing"},
        frozenset({"soft_label"}),
        BetaDpoOptions,
        is_coupled=True,
    ),
    LossKind.plackett_luce: KindFacts(
        "ranked y1 > ... > yK: -sum over k of (b Dk - logsumexp over j >= k of b Dj)",
        "DPO paper, appendix A.3, arXiv 2305.18290",
        frozenset({"beta", "ld_alpha"}),
        accepts_rankings=True,
    ),
    LossKind.kto: KindFacts(
        "good: wd (1 - s(b (D - z))), bad: wu (1 - s(b (z - D))); wd, wu = `loss.desirable_weight`, "
        "`loss.undesirable_weight`",
        "KTO, arXiv 2402.01306",
        _LABELLED,
        frozenset(),
        is_unpaired=True,
        needs_partners=True,
        fewest_responses=1,
    ),
    LossKind.apo_zero_unpaired: KindFacts(
        "`kto` with z = 0",
        "APO, arXiv 2408.06266",
        _LABELLED,
        is_unpaired=True,
        fewest_responses=1,
    ),
    LossKind.reward: KindFacts(
        "-(1-e) ls(h) - e ls(-h) + c (sw + sl)^2, h = sw - sl of the scores, c = `loss.options.centre`; "
        "ranked: `plackett_luce` of the scores",
        "Bradley-Terry, arXiv 2203.02155; centring: arXiv 2312.09244",
        frozenset({"label_smoothing"}),
        frozenset(NUMBERS),
        RewardOptions,
        needs_reference=False,
        accepts_rankings=True,
        of_scores=True,
    ),
    LossKind.custom: KindFacts(
        "returned by your own `function`",
        "[your own](python.md#a-loss-of-your-own)",
        _PAIR | {"function", "label_smoothing"},
        frozenset(NUMBERS),
    ),
}


def loss_unit(kinds: Iterable[str]) -> str:
    """Return what has one loss under these kinds: a "record" with one response, or a "pair"."""
    return "record" if any(kind in KINDS and KINDS[LossKind(kind)].is_unpaired for kind in kinds) else "pair"


def option_names(kind: LossKind) -> list[str]:
    """Return the names of the options that a kind has."""
    options = KINDS[kind].options
    return [] if options is None else list(schema_fields(options))


def kinds_using(option: str) -> list[LossKind]:
    """Return the kinds whose formula depends on a key of `loss`: `beta`, `options.gamma`."""
    name = option.removeprefix("options.")
    if name != option:
        return [kind for kind in KINDS if name in option_names(kind)]
    return [kind for kind, facts in KINDS.items() if option in facts.uses]


NO_OPTION = "no_option"
"""Type of pydantic's error for options that a kind does not have; its context: `kind`, the wrong `names`, and
the kind's options, `known`."""


def _options_of_kind(given: Any, info: ValidationInfo) -> Any:
    """Return all options of the kind: those `given`, and defaults for the others.

    None for a kind without options, and for a sum: each of its terms has its own options.
    """
    kind = info.data.get("kind")
    is_sum = bool(info.data.get("terms"))
    if kind is None:  # the wrong kind is already an error
        return None
    values = vars(given) if is_dataclass(given) else given
    if values is None:
        values = {}
    if not isinstance(values, dict):
        return values  # pydantic refuses them
    options = KINDS[kind].options
    valid = [] if is_sum else option_names(kind)
    names = [str(name) for name in values if name not in valid]
    if names:
        facts = {"kind": "" if is_sum else str(kind), "known": valid, "names": names}
        raise PydanticCustomError(NO_OPTION, "no options of {kind}: {names}; it has {known}", facts)
    return validated(TypeAdapter(options), values) if valid and options is not None else None


KindOptions: TypeAlias = Annotated[
    IpoOptions
    | BcoPairOptions
    | DiscopopOptions
    | DpopOptions
    | OdpoOptions
    | RewardAwareOptions
    | SimpoOptions
    | OrpoOptions
    | CpoOptions
    | DistillOptions
    | BetaDpoOptions
    | RewardOptions
    | None,
    BeforeValidator(_options_of_kind),
]


def _options() -> Any:
    """Return the field `options`, which is filled in where a configuration has none."""
    return key(None, accepts="a mapping with options of the kind, or null", validate_default=True)


@schema
class LossTermConfig:
    """One summand of `loss.terms`."""

    kind: LossKind = key(...)
    """Kind of loss."""
    weight: float = key(1.0)
    """Weight in the sum."""
    options: KindOptions = _options()
    """Options of this kind, as in `loss.options`."""


Term = Annotated[
    LossTermConfig, BeforeValidator(as_entry("kind"), json_schema_input_type=LossTermConfig | LossKind)
]


@schema
class SyncReferenceConfig:
    """TR-DPO: a live reference model that follows the policy (arXiv 2404.09656)."""

    every: int | None = key(None, ge=1)
    """Steps between updates of the live reference; null: no updates."""
    mixup: float = key(0.6, gt=0, le=1)
    """Share of the policy's weights in the updated reference."""


LOSS_FUNCTION = "loss.function"


@schema
class LossConfig:
    """The loss, its options and its sums."""

    reference_free: ClassVar[bool] = False
    """Whether the reference's log-probs are taken as 0."""

    kind: LossKind = key(LossKind.sigmoid, verbs="train precompute evaluate")
    """Kind of loss; formulas: docs/losses.md."""
    beta: float = key(0.1, gt=0)
    """Strength of the pull toward the reference model."""
    # At 0.5 the loss prefers neither response (`robust` divides by 0), above the rejected one.
    label_smoothing: float | None = key(None, ge=0, lt=0.5)
    """Assumed share of pairs with swapped labels; null: 0, for `exo_pair` 1e-3."""
    divergence: Divergence = key(Divergence.reverse_kl)
    """f-divergence that turns log-ratios into scores."""
    alpha_coefficient: float = key(0.5, ge=-10, le=10)
    """Order of `divergence=alpha`."""
    desirable_weight: float = key(1.0, gt=0)
    """`kto`, `apo_zero_unpaired`: weight of good responses."""
    undesirable_weight: float = key(1.0, gt=0)
    """`kto`, `apo_zero_unpaired`: weight of bad responses."""
    ld_alpha: float | None = key(None, ge=0, le=1)
    """Weight of tokens beyond the shorter response's length (arXiv 2409.06411); null: 1."""
    weighting: Weighting = key(Weighting.none)
    """Weight of each pair's loss; `wpo` (arXiv 2406.11827): by the probability of both responses."""
    terms: list[Term] = key([], verbs="train precompute evaluate")
    """Weighted sum of kinds, in place of `kind`: `[{kind: sigmoid, weight: 1}, ...]`."""
    options: KindOptions = _options()
    """Options of `kind`: `{gamma: 1}`; null: their defaults."""
    sync_reference: SyncReferenceConfig = section(SyncReferenceConfig)
    router: RouterConfig = section(RouterConfig, verbs="train")
    function: str | None = key(None, runs="Python code of the loss is run")
    """`custom`: the loss function, as `module:function`."""

    @property
    def kinds(self) -> tuple[LossKind, ...]:
        """The kinds of `terms`, or `kind`."""
        return tuple(term.kind for term in self.terms) or (self.kind,)

    @property
    def facts(self) -> list[KindFacts]:
        """The facts of `kinds`, in their order."""
        return [KINDS[kind] for kind in self.kinds]

    def options_of(self, kind_options: type[T]) -> T:
        """Return the options of this class; at their defaults if no kind of this loss has them."""
        entries = [term.options for term in self.terms] or [self.options]
        return next((each for each in entries if isinstance(each, kind_options)), kind_options())

    @property
    def has_running_reward(self) -> bool:
        """Return whether the loss depends on the mean reward of the pairs so far."""
        return self.options_of(BcoPairOptions).delta is BcoDelta.running_mean

    def takes(self, number: str) -> bool:
        """Return whether the loss uses this entry of `NUMBERS`.

        A sum uses `loss_weight` if all its losses do, and any other entry if all its pair losses do.
        """
        if number == "loss_weight":  # the running mean would ignore weights
            return not self.has_running_reward and all(number in facts.numbers for facts in self.facts)
        pair_facts = [facts for facts in self.facts if facts.fewest_responses > 1]
        return bool(pair_facts) and all(number in facts.numbers for facts in pair_facts)

    def uses(self, option: str) -> bool:
        """Return whether the loss depends on the field `option`, which is not one of `options`."""
        return any(option in facts.uses for facts in self.facts)

    @property
    def is_coupled(self) -> bool:
        """Return whether the loss of a pair depends on the other pairs of its global batch."""
        return any(facts.is_coupled for facts in self.facts)

    @property
    def needs_reference(self) -> bool:
        """Return whether the loss depends on a reference's log-probs."""
        return not self.reference_free and any(facts.needs_reference for facts in self.facts)

    @property
    def needs_teacher(self) -> bool:
        """Return whether the loss depends on a teacher's distributions."""
        return any(facts.needs_teacher for facts in self.facts)

    @property
    def is_one_sided(self) -> bool:
        """Return whether the loss uses only chosen responses."""
        return all(facts.fewest_responses == 1 for facts in self.facts) and not self.is_unpaired

    @property
    def is_unpaired(self) -> bool:
        """Return whether each record has one response, labelled as good or bad."""
        return any(facts.is_unpaired for facts in self.facts)

    @property
    def unit(self) -> str:
        """Return what has one loss: a "record" or a "pair"."""
        return loss_unit(self.kinds)

    @property
    def needs_partners(self) -> bool:
        """Return whether each record also needs the score of a response to another prompt."""
        return any(facts.needs_partners for facts in self.facts)

    @property
    def compares_pairs(self) -> bool:
        """Return whether each record has chosen and rejected responses, and so a margin of rewards."""
        return not (self.is_one_sided or self.is_unpaired)

    @property
    def accepts_rankings(self) -> bool:
        """Return whether a record may have more than two responses."""
        return all(facts.accepts_rankings for facts in self.facts)

    @property
    def of_scores(self) -> bool:
        """Return whether the model is a reward model, whose responses have scores in place of log-probs."""
        return any(facts.of_scores for facts in self.facts)

    @property
    def needs_scores(self) -> bool:
        """Return whether the chosen response of every pair must be scored above the rejected one."""
        return any(facts.needs_scores for facts in self.facts)


class ReferenceFreeLossConfig(LossConfig):
    """The same keys with `reference.mode=none`."""

    reference_free = True


def accepts_facts(name_in_config: str | None) -> bool:
    """Return whether a loss function has an argument `facts`, which gets the `BatchFacts`."""
    return "facts" in signature(user_function(name_in_config, LOSS_FUNCTION)).parameters
