"""Prepare a run's reference: find or compute its log-probs, and check a sample before the first step."""

import itertools
import math
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from dpo_dist.batching.costs import ComputeCosts
from dpo_dist.batching.pack import PackedBatch
from dpo_dist.batching.plan import SCORING_TOKENS_FACTOR
from dpo_dist.batching.sampler import Indices
from dpo_dist.batching.step_batch import RankBatch
from dpo_dist.config.schema import Accept, Dtype, Quantization, ReferenceMode
from dpo_dist.data import source_labels
from dpo_dist.distributed.memory import peak_memory_bytes
from dpo_dist.distributed.zero import Engine
from dpo_dist.encoded.dataset import PreferenceDataset
from dpo_dist.foundation.errors import ReferenceModelError
from dpo_dist.foundation.text import duration, percent, pluralize, size, without_secrets
from dpo_dist.model.architectures import UNPACKABLE, WITH_STATES
from dpo_dist.model.attention.kernels import choose_backend
from dpo_dist.model.files.folder import tokenizer_folder
from dpo_dist.model.files.load import check_same_vocabulary, load_config, tokenizer_digest
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
# Largest accepted difference of stored and new log-probs, in nats, in the mean of a response's tokens.
_TOLERANCE = {Dtype.fp32: 1e-4, Dtype.fp16: 2e-2, Dtype.bf16: 5e-2}


@torch.no_grad()
def check_drift(
    run: Run, score: Scorer, objective: Objective, sample: "StoredSample", costs: ComputeCosts
) -> dict[str, Any]:
    """Score a sample again and compare with the stored log-probs; collective.

    `score`: the reference model, or a policy that starts as the reference, before its first update. Raises
    what `compare` raises. Returns the drift per token and per response, in nats, for the report.
    """
    device = run.world.device
    rank_batch = run.shard(sample.dataset, sample.indices, costs, [REFERENCE])

    def drift(host_batch: PackedBatch) -> StoredLogps:
        batch = host_batch.to(device)
        stored = objective.reference.token_logps(batch)
        assert stored is not None, "the step-0 check needs a reference"
        values: StoredLogps = (score(batch.view(REFERENCE)) - stored).cpu().numpy()
        return values

    with objective.prefetch_batches(rank_batch, device) as batches:
        drifts = compare(run, sample, rank_batch, batches, drift, "reference log-probs")
    sums = np.array([drift.sum() for drift in drifts])
    return {
        "responses": len(drifts),
        "mean_token_drift": float(np.mean([np.abs(drift).mean() for drift in drifts])),
        "largest_token_drift": max(float(np.abs(drift).max()) for drift in drifts),
        "rms_response_drift": float(np.sqrt(np.mean(sums**2))),
        "largest_response_drift": float(np.abs(sums).max()),
    }


class StoredSample(NamedTuple):
    """Indices of a dataset whose stored entries are compared with a model.

    `urls`: those from which some of the entries were fetched and never compared. `unsampled`: those that
    only other datasets have entries of.
    """

    dataset: PreferenceDataset
    indices: Indices
    store: LogpStore | None
    urls: Collection[str]
    unsampled: Collection[str] = ()


def choose_sample(
    run: Run, store: LogpStore | None, datasets: Sequence[tuple[PreferenceDataset, Indices]], scorer: str
) -> StoredSample:
    """Return a seeded sample of the scored indices of a dataset. Collective.

    It is the first dataset with entries that were fetched and never compared, of which the sample has as many
    more for each URL. What other URLs gave for other datasets is said: a later start compares it.
    """

    def choose() -> tuple[int, Indices, Collection[str], Collection[str]]:
        fetched: list[dict[str, Indices]] = [{}]
        if store is not None and any(store.origins()):
            places = [(each.view(scorer).keys, each.response_indices(visited)) for each, visited in datasets]
            fetched = [store.fetched(keys[responses]) for keys, responses in places]
        number = next((number for number, by_url in enumerate(fetched) if by_url), 0)
        dataset, visited = datasets[number]
        groups = [visited]
        for rows in fetched[number].values():
            responses = dataset.response_indices(visited)[rows]
            groups.append(np.unique(dataset.locate_responses(responses)[0]))
        generator = np.random.default_rng([run.config.trainer.seed, 0xA0D17])
        chosen = [generator.choice(each, min(_CHECKED_PAIRS, len(each)), replace=False) for each in groups]
        unsampled = sorted({*itertools.chain(*fetched)} - {*fetched[number]})
        return number, np.unique(np.concatenate(chosen)), [*fetched[number]], unsampled

    number, indices, urls, unsampled = run.world.on_main(choose)
    if unsampled:
        others = ", ".join(unsampled)
        run.warn(
            f"{scorer}: what {others} gave for other data of this run is not compared; a later start does"
        )
    return StoredSample(datasets[number][0], indices, store, urls, unsampled)


def compare(
    run: Run,
    sample: StoredSample,
    share: RankBatch,
    batches: Iterable[PackedBatch],
    difference: Callable[[PackedBatch], StoredLogps],
    what: str,
) -> list[StoredLogps]:
    """Return the differences of what is stored and what is computed, of the tokens of each response.

    `share`, `batches`: this rank's of the sample; `difference`: of the tokens of a batch. What the sample's
    URLs gave counts as compared from now on. Raises a `ReferenceModelError` about `what` if differences are
    larger than the precision explains; then the store keeps nothing of these URLs. Collective.
    """
    dtype = run.config.model.dtype

    def tolerance(tokens: int) -> float:
        # 16-bit log-probs depend on the batch's shape: single tokens differ, the mean of many hardly.
        return _TOLERANCE[dtype] * (1.0 if dtype is Dtype.fp32 else max(1.0, 8 / math.sqrt(tokens)))

    named: list[tuple[str, StoredLogps]] = []
    for micro_batch, batch in zip(share.micro_batches, batches, strict=True):
        values = difference(batch)
        if micro_batch and run.world.leads:
            names = []
            for index in micro_batch:
                numbers = range(len(sample.dataset.response_range(index)))
                scored = [number for number in numbers if share.which in (None, number)]
                names += [f"{sample.dataset.origin(index)} response {number}" for number in scored]
            parts = np.split(values, np.cumsum(batch.response_tokens.numpy())[:-1])
            named += zip(names, parts, strict=True)
    named = [*itertools.chain(*run.world.gather(named))]
    means = {name: float(np.abs(of_tokens).mean()) for name, of_tokens in named}
    # "mean > tolerance" would accept nan.
    failed = [name for name, of_tokens in named if not means[name] <= tolerance(len(of_tokens))]
    remedy = "the store belongs to another model or is damaged: set another reference.store"
    if sample.store is not None and sample.urls:
        run.world.on_main(partial(sample.store.settle, sample.urls, are_right=not failed))
        remedy = f"remove {', '.join(sample.urls)} from reference.behind: nothing of it is kept; or {remedy}"
    if failed:
        raise ReferenceModelError(
            f"{len(failed)} of {len(named)} sampled {what} differ from a fresh computation",
            where="; ".join(f"{name} ({means[name]:.2g})" for name in failed[:5]),
            got="the mean difference per token in parentheses, in nats",
            expected=f"at most {_TOLERANCE[dtype]:g} with model.dtype={dtype}, more for short responses in "
            "16 bits",
            remedy=remedy,
        )
    return [of_tokens for _, of_tokens in named]


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
    sample = choose_sample(run, provider.store, inputs.datasets_to_score, REFERENCE)
    if (sample.urls or scored.engine is not None) and not is_checked_later:
        objective = Objective(config.loss, provider)
        report["drift"] = check_drift(run, filler.load_scorer(), objective, sample, filler.costs)
        drift = describe_drift(report["drift"])
        say = run.say if sample.urls else run.note
        say(f"reference check passed: stored and newly computed log-probs are {drift}")
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


def recipe_of(run: Run, inputs: EvaluationInputs) -> dict[str, Any]:
    """Return what decides the token ids of a run's prompts and responses, without paths of its machine."""
    config = run.config
    files = inputs.policy_files
    labels = source_labels(config.data.train)
    sources = zip(labels, config.data.train, strict=True)
    recipe = {
        **{f"data.{name}": value for name, value in config.data.encoding_identity.items()},
        "data.train": [f"{label}@{source.revision}" for label, source in sources],
        "data.chat_template": config.data.chat_template,
        "reference.system": config.reference.system,
        "teacher.system": config.teacher.system,
        "tokenizer": tokenizer_digest(tokenizer_folder(files.folder, files.adapter)),
    }
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
        rounding = run.config.reference.accept is Accept.rounding
        options |= {"behind": behind, "recipe": recipe_of(run, self.inputs), "rounding": rounding}
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
        for fingerprint, responses in filled.rounded.items():
            run.say(f"{name}: {responses:,} of them by other numerics, of the fingerprint {fingerprint}")
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
