"""Prepare a run's reference: find or compute its log-probs, and check a sample before the first step."""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dpo_dist.batching.costs import ComputeCosts
from dpo_dist.batching.plan import SCORING_TOKENS_FACTOR
from dpo_dist.batching.sampler import Indices
from dpo_dist.config.schema import Dtype, Quantization, ReferenceMode, RunConfig
from dpo_dist.data import source_labels
from dpo_dist.distributed.memory import peak_memory_bytes
from dpo_dist.distributed.zero import Engine
from dpo_dist.encoded.dataset import PreferenceDataset
from dpo_dist.foundation.errors import ReferenceModelError
from dpo_dist.foundation.fields import plain_values
from dpo_dist.foundation.text import duration, percent, pluralize, size, without_secrets
from dpo_dist.model.architectures import UNPACKABLE, WITH_STATES
from dpo_dist.model.attention.kernels import choose_backend
from dpo_dist.model.files.load import check_same_vocabulary, load_config
from dpo_dist.model.flops import compute_costs, visited_experts
from dpo_dist.model.layers import choose_fused
from dpo_dist.model.numerics import numerics_profile
from dpo_dist.objective.token_logps import Statistic
from dpo_dist.reference.behind import Behind
from dpo_dist.reference.digest import Profile, check_same_numerics, model_label
from dpo_dist.reference.engine import ReferenceProvider, load_reference, scoring_config
from dpo_dist.reference.fill import ENTRIES_PER_SHARD, FillReport, Scorer, StoreFiller
from dpo_dist.reference.store import LogpStore, ReferenceFingerprint, StoredLogps
from dpo_dist.training.start.inputs import EvaluationInputs
from dpo_dist.training.start.open_run import Run
from dpo_dist.training.steps.step import Objective

REFERENCE = "reference"
_CHECKED_PAIRS = 16
_LEAST_SAVED = 0.01
_DECIDE_IDS = (
    "max_length",
    "max_prompt_length",
    "max_scorer_length",
    "truncation",
    "text_as_messages",
    "chat_template",
    "template_arguments",
)
# Largest accepted difference of stored and new log-probs, in nats, in the mean of a response's tokens.
_TOLERANCE = {Dtype.fp32: 1e-4, Dtype.fp16: 2e-2, Dtype.bf16: 5e-2}


@torch.no_grad()
def check_drift(
    run: Run,
    score: Scorer,
    objective: Objective,
    dataset: PreferenceDataset,
    visited: Indices,
    costs: ComputeCosts,
) -> dict[str, Any]:
    """Score a seeded sample of the `visited` indices again and compare with the stored log-probs; collective.

    `score`: the reference model, or a policy that starts as the reference, before its first update. Raises a
    `ReferenceModelError` if log-probs differ by more than the precision explains. Returns the drift per token
    and per response, in nats, for the report.
    """
    world = run.world
    rank_batch = run.shard(dataset, pairs_to_check(run, visited), costs, [REFERENCE])
    drifts: list[tuple[str, StoredLogps]] = []
    with objective.prefetch_batches(rank_batch, world.device) as batches:
        for micro_batch, host_batch in zip(rank_batch.micro_batches, batches, strict=True):
            batch = host_batch.to(world.device)
            stored = objective.reference.token_logps(batch)
            assert stored is not None, "the step-0 check needs a reference"
            fresh = score(batch.view(REFERENCE))
            if micro_batch and world.leads:
                names = []
                for index in micro_batch:
                    numbers = range(len(dataset.response_range(index)))
                    scored = [number for number in numbers if rank_batch.which in (None, number)]
                    names += [f"{dataset.origin(index)} response {number}" for number in scored]
                parts = torch.split((fresh - stored).cpu(), host_batch.response_tokens.tolist())
                drifts += zip(names, (part.numpy() for part in parts), strict=True)
    drifts = [*itertools.chain(*world.gather(drifts))]
    check_differences(drifts, run.config.model.dtype, "reference log-probs")
    sums = np.array([drift.sum() for _, drift in drifts])
    return {
        "responses": len(drifts),
        "mean_token_drift": float(np.mean([np.abs(drift).mean() for _, drift in drifts])),
        "largest_token_drift": max(float(np.abs(drift).max()) for _, drift in drifts),
        "rms_response_drift": float(np.sqrt(np.mean(sums**2))),
        "largest_response_drift": float(np.abs(sums).max()),
    }


def pairs_to_check(run: Run, visited: Indices) -> Indices:
    """Return a sample of the `visited` indices, the same in every start of a run."""
    generator = np.random.default_rng([run.config.trainer.seed, 0xA0D17])
    count = min(_CHECKED_PAIRS, len(visited))
    return np.sort(generator.choice(visited, size=count, replace=False))


def check_differences(differences: Sequence[tuple[str, StoredLogps]], dtype: Dtype, what: str) -> None:
    """Check the differences of what is stored and what is computed, of each token of a response by name.

    Raises a `ReferenceModelError` about `what` if they are larger than the precision explains.
    """

    def tolerance(tokens: int) -> float:
        # 16-bit log-probs depend on the batch's shape: single tokens differ, the mean of many hardly.
        return _TOLERANCE[dtype] * (1.0 if dtype is Dtype.fp32 else max(1.0, 8 / math.sqrt(tokens)))

    means = {name: float(np.abs(of_tokens).mean()) for name, of_tokens in differences}
    # "mean > tolerance" would accept nan.
    failed = [name for name, of_tokens in differences if not means[name] <= tolerance(len(of_tokens))]
    if failed:
        raise ReferenceModelError(
            f"{len(failed)} of {len(differences)} sampled {what} differ from a fresh computation",
            where="; ".join(f"{name} ({means[name]:.2g})" for name in failed[:5]),
            got="the mean difference per token in parentheses, in nats",
            expected=f"at most {_TOLERANCE[dtype]:g} with model.dtype={dtype}, more for short responses in "
            "16 bits",
            remedy="the store belongs to another model or is damaged: set another reference.store",
        )


def describe_drift(drift: dict[str, Any]) -> str:
    """Return the result of `check_drift` as the end of a sentence: "the log-probs are ..."."""
    responses = pluralize(drift["responses"], "response")
    if not drift["largest_token_drift"]:
        return f"equal on a sample of {responses}"
    return (
        f"equal within rounding on a sample of {responses}: they differ by at most "
        f"{drift['largest_token_drift']:.2g} nats in a token, "
        f"{drift['largest_response_drift']:.2g} in a response"
    )


@dataclass(frozen=True)
class Reference:
    """A run's reference: where its log-probs come from, and the report about them."""

    provider: ReferenceProvider
    policy_starts_as_reference: bool
    """Same model, same precision: before step 0, both give the same log-probs."""
    report: dict[str, Any]  # the section `reference` of summary.json


def prepare_reference(run: Run, inputs: EvaluationInputs, *, step0_follows: bool = False) -> Reference:
    """Return the reference in every mode except `adapter`; in mode `cached`, fill the store. Collective.

    With `step0_follows`, the sample is not scored here if the policy starts as the reference: the check
    before step 0 does it. Raises a `StoppedError` if a rank is asked to stop; log-probs scored before are
    stored.
    """
    config = run.config
    world = run.world
    mode = config.reference.mode
    files = inputs.reference_files
    if mode is ReferenceMode.none:
        return reference_without_store(run, ReferenceProvider(), policy_starts_as_reference=False)
    assert files is not None, "every other mode has a reference model"
    if config.reference.path:
        world.on_main(
            lambda: check_same_vocabulary(files.folder, inputs.tokenizer, config.model, inputs.processor)
        )
    same_precision = config.reference.quantization is config.model.quantization
    policy_starts_as_reference = same_precision and files.digest == inputs.policy_files.digest
    load = partial(
        load_reference,
        files,
        config.model,
        config.reference,
        config.data.longest,
        world,
        inputs.processor,
    )
    if mode is ReferenceMode.live:
        return reference_without_store(
            run, ReferenceProvider(engine=load()), policy_starts_as_reference=policy_starts_as_reference
        )
    # The entries of the store that these files give under these numerics (law L3).
    label = model_label(config.reference.path or config.model.path, files.folder)
    profile = scoring_profile(run, files.folder, config.reference.quantization)
    empty = LogpStore(Path(config.reference.store), ReferenceFingerprint(files.digest, profile, label), [])
    # Fill the store; the model is loaded only if log-probs are missing, and freed at the end.
    scored = ScoredOnce(run, inputs, load)
    filler = scored.filler(empty, ENTRIES_PER_SHARD)
    filled = scored.fill(filler, inputs.read_by(REFERENCE), REFERENCE, "log-prob")
    report = {"mode": config.reference.mode.value, **filled.as_dict(), "entries": str(empty.folder)}
    provider = ReferenceProvider(store=filler.open_filled())
    # While the model is there a sample is scored again, unless the check before step 0 does it.
    is_checked_later = policy_starts_as_reference and step0_follows
    if (
        scored.engine is None
        and not is_checked_later
        and any(each["entries"] for each in filled.fetched.values())
    ):
        run.warn("reference: fetched log-probs are not compared with the model, which is not loaded")
    if scored.engine is not None and not is_checked_later:
        objective = Objective(config.loss, provider)
        score = scored.engine.token_logps
        report["drift"] = check_drift(run, score, objective, *inputs.datasets_to_score[0], filler.costs)
        drift = describe_drift(report["drift"])
        run.note(f"reference check passed: stored and newly computed log-probs are {drift}")
    report |= scored.free()
    return Reference(provider, policy_starts_as_reference, report)


def scoring_profile(run: Run, folder: Path, quantization: Quantization | None) -> Profile:
    """Return the numerics under which this run scores by the model in `folder`; collective."""
    config = run.config
    world = run.world
    backend = choose_backend(config.model.attention, config.model.dtype, world.device)
    text = load_config(folder, config.model).get_text_config()
    profile = numerics_profile(
        scoring_config(config.model, quantization),
        backend,
        choose_fused(config.model, text, world.device),
        world.device,
        recurrent=text.model_type in WITH_STATES | UNPACKABLE,
        has_experts=visited_experts(text) > 0,
        sharing=1 if world.experts is None else world.experts.ranks,
    )
    check_same_numerics(profile, world)
    return profile


def recipe_of(config: RunConfig) -> dict[str, Any]:
    """Return what decides the token ids of a run's prompts and responses, without paths of its machine."""
    data = plain_values(config.data)
    recipe = {f"data.{name}": data[name] for name in _DECIDE_IDS}
    labels = source_labels(config.data.train)
    recipe["data.train"] = [
        f"{label}@{source.revision}" for label, source in zip(labels, config.data.train, strict=True)
    ]
    recipe["reference.system"] = config.reference.system
    recipe["teacher.system"] = config.teacher.system
    return dict(without_secrets(recipe))


@dataclass
class ScoredOnce:
    """A model that fills a store; it is loaded only if the store lacks something. Methods are collective."""

    run: Run
    inputs: EvaluationInputs
    load: Callable[[], Engine]
    statistics: Sequence[Statistic] = ()
    engine: Engine | None = None

    def filler(self, empty: LogpStore, entries_per_shard: int, **options: Any) -> StoreFiller:
        """Return what fills the store of which `empty` has opened nothing; further fields by name."""
        run = self.run
        prefixes = run.config.trainer.prefix_tree

        def load_scorer() -> Scorer:
            # The costs, which balance the ranks, depend on the kernel and arrangement of the loaded model.
            if self.engine is None:
                self.engine = self.load()
                model = self.engine.model
                device = run.world.device
                costs = compute_costs(
                    self.inputs.flops, prefixes=prefixes, backend=model.backend, device=device
                )
                filler.costs = replace(costs, arrangement=model.arrangement)
            return partial(self.engine.token_logps, statistics=self.statistics)

        tokens = SCORING_TOKENS_FACTOR * run.micro_batch_tokens
        costs = compute_costs(self.inputs.flops, prefixes=prefixes)
        behind = [*map(Behind, run.config.reference.behind)]
        options |= {"behind": behind, "recipe": recipe_of(run.config)}
        filler = StoreFiller(
            empty, load_scorer, run.world, tokens, costs, entries_per_shard, run.stops, **options
        )
        return filler

    def fill(
        self, filler: StoreFiller, datasets: Sequence[tuple[PreferenceDataset, Indices]], name: str, unit: str
    ) -> FillReport:
        """Fill the store for all datasets, and say what was computed: `unit`s of the model `name`."""
        run = self.run
        filled = FillReport()
        for dataset, indices in datasets:
            with run.console.progress(f"{name}: scoring responses", run.config.loss.unit) as progress:
                filled += filler.fill(dataset, indices, progress)
        took = f", in {duration(filled.seconds)}" if filled.computed else ""
        counts = [f"{pluralize(filled.computed, unit)} computed", f"{filled.hits:,} reused"]
        for url, each in filled.fetched.items():
            counts.append(f"{each['entries']:,} from {url} ({size(each['bytes_read'])})")
            if each["differences"]:
                asked = pluralize(each["responses"], "response")
                run.warn(
                    f"{name}: {url} lacks most of {asked}; other there: {'; '.join(each['differences'])}"
                )
            if each["left_out"]:
                left_out = pluralize(each["left_out"], "entry", "entries")
                run.warn(f"{name}: {left_out} of {url} left out: damaged, or not of these responses")
        run.say(f"{name}: {', '.join(counts)}{took}")
        sharing = describe_saving(filler.computed_tokens, filler.tokens)
        if filler.costs.shares_prefixes and sharing:
            run.note(f"{name}: {sharing}")
        for shard in sorted(filled.damaged):
            store = filler.store.root
            run.warn(f"the reference store has a damaged file, which is ignored: {store}/{shard}")
        return filled

    def free(self) -> dict[str, int]:
        """Release the model if it was loaded, and return its peak of memory as a report's entry."""
        if self.engine is None:
            return {}
        world = self.run.world
        self.engine.free()
        peak = max(world.gather(peak_memory_bytes(world.device)))
        if world.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        return {"peak_memory_bytes": peak}


def reference_without_store(
    run: Run, provider: ReferenceProvider, *, policy_starts_as_reference: bool
) -> Reference:
    """Return a reference that computes log-probs with each micro-batch, or that has none."""
    report = {"mode": run.config.reference.mode.value, **FillReport().as_dict()}
    return Reference(provider, policy_starts_as_reference, report)


def describe_saving(computed: int, tokens: int) -> str | None:
    """Return how many tokens fewer shared prefixes let a model compute; None if it is little."""
    share = 1 - computed / tokens if tokens else 0.0
    return f"{percent(share)} fewer tokens than by sharing prompts only" if share >= _LEAST_SAVED else None
