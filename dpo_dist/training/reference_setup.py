"""The reference of a run: its provider, and in mode `cached` the store filled and checked."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dpo_dist.config.schema import Numerics, ReferenceMode, RunConfig
from dpo_dist.data.dataset import PreferenceDataset
from dpo_dist.data.sampler import Indices
from dpo_dist.distributed.device_memory import peak_memory_bytes, reset_peak_memory
from dpo_dist.distributed.engine import FrozenEngine, PolicyEngine
from dpo_dist.distributed.reference_sync import ReferenceSync
from dpo_dist.distributed.stops import Stops
from dpo_dist.distributed.world import World
from dpo_dist.model.attention_backend import choose_backend
from dpo_dist.model.numerics import numerics_of
from dpo_dist.number_text import counted, duration
from dpo_dist.reference.compatible import (
    OWN_NUMERICS,
    Reused,
    agree_on_numerics,
    count_reused,
    count_unused,
    find_compatible,
)
from dpo_dist.reference.digest import ModelFiles, model_label
from dpo_dist.reference.engine import ReferenceEngine, load_digested, scored_model, scoring_tokens
from dpo_dist.reference.fill import FillReport, StoreFiller, check_complete
from dpo_dist.reference.fingerprint import ReferenceFingerprint
from dpo_dist.reference.providers import (
    AdapterReference,
    LiveReference,
    NoReference,
    ReferenceProvider,
    StoredReference,
)
from dpo_dist.reference.scoring import Scorer
from dpo_dist.reference.store import LogpStore
from dpo_dist.reference.vocabulary import check_same_vocabulary
from dpo_dist.report.terminal.console import Console
from dpo_dist.training.batch_loss import Objective
from dpo_dist.training.data_setup import EvaluationInputs, Inputs
from dpo_dist.training.reference_check import check_drift, describe_drift

Audited = tuple[PreferenceDataset, Indices]


@dataclass(frozen=True)
class Reference:
    """The reference of a run.

    Attributes:
        provider: source of its log-probs.
        is_policys_start: whether the policy starts as this model, in the same precision.
        audited: a dataset and those of its indices from which the step-0 check takes its sample.
        report: the section `reference` of summary.json.
    """

    provider: ReferenceProvider
    is_policys_start: bool
    audited: Audited
    report: dict[str, Any]


def prepare_reference(
    config: RunConfig,
    inputs: Inputs | EvaluationInputs,
    world: World,
    console: Console,
    stops: Stops | None = None,
) -> Reference:
    """Return the reference in every mode but `adapter`; fill the store in mode `cached`. Collective.

    Raises:
        StoppedError: a rank was asked by `stops` to stop; what is scored is stored.
    """
    mode = config.reference.mode
    if mode is ReferenceMode.none:
        return _reference(NoReference(), False, mode, inputs)
    files = inputs.reference_files
    assert files is not None, "every other mode has a reference model"
    if config.reference.path:
        world.on_main(lambda: check_same_vocabulary(files.folder, inputs.tokenizer, config.model))
    same_precision = config.reference.quantization is config.model.quantization
    is_start = same_precision and files.digest == inputs.policy_files.digest
    if mode is ReferenceMode.live:
        return _reference(LiveReference(load_digested(files, config, world)), is_start, mode, inputs)
    provider, report, audited = _stored_reference(config, inputs, files, is_start, world, console, stops)
    return Reference(provider, is_start, audited, {"mode": mode.value, **report})


def adapter_reference(policy: PolicyEngine, inputs: Inputs) -> Reference:
    """Return the reference in mode `adapter`: the policy with its adapter switched off."""
    return _reference(AdapterReference(policy), True, ReferenceMode.adapter, inputs)


def open_reference_sync(
    config: RunConfig, reference: ReferenceProvider, policy: PolicyEngine, world: World
) -> ReferenceSync | None:
    """Return the updater of a reference that follows the policy; None without `loss.sync_reference`."""
    sync = config.loss.sync_reference
    if sync.every is None:
        return None
    assert isinstance(reference, LiveReference)
    assert isinstance(reference.engine, FrozenEngine)
    return ReferenceSync(reference.engine, policy, sync, world)


def over_starts(former: Mapping[str, Any], report: Mapping[str, Any]) -> dict[str, Any]:
    """Return the report of a resumed run: what all starts computed, and what the first one found.

    A later start finds what the first one computed, and makes no step-0 check.

    Args:
        former: of the starts before; empty: not known.
        report: of this start.
    """
    if not former:
        return dict(report)
    peaks = [part["peak_memory_bytes"] for part in (former, report) if "peak_memory_bytes" in part]
    return {
        **former,
        **report,
        "hits": former["hits"],
        "computed": former["computed"] + report["computed"],
        "seconds": round(former["seconds"] + report["seconds"], 3),
        "damaged": sorted({*former["damaged"], *report["damaged"]}),
        **({"drift": former["drift"]} if "drift" in former else {}),
        **({"peak_memory_bytes": max(peaks)} if peaks else {}),
    }


def _reference(
    provider: ReferenceProvider, is_start: bool, mode: ReferenceMode, inputs: Inputs | EvaluationInputs
) -> Reference:
    """Return a reference without stored log-probs."""
    report = {"mode": mode.value, **FillReport().as_dict()}
    return Reference(provider, is_start, inputs.visited[0], report)


def _stored_reference(
    config: RunConfig,
    inputs: Inputs | EvaluationInputs,
    files: ModelFiles,
    is_start: bool,
    world: World,
    console: Console,
    stops: Stops | None,
) -> tuple[StoredReference, dict[str, Any], Audited]:
    """Fill the store with all log-probs of the run; then free the reference engine. Collective.

    A sample is re-scored while the engine is loaded. Log-probs of other numerics are always re-scored: by the
    policy in the step-0 check if it starts as the reference, else by an engine that is loaded for it.

    Args:
        files: of the reference model.
        is_start: whether the policy starts as the reference.

    Returns:
        The provider, the report for summary.json, and the examples for the step-0 check.
    """
    fingerprint = _fingerprint(config, files, world)
    compatible = _compatible(config, fingerprint, inputs, world, console)
    empty = LogpStore(Path(config.reference.store), [fingerprint, *compatible], [])
    engines: list[ReferenceEngine] = []

    def load_scorer() -> Scorer:
        if not engines:
            engines.append(load_digested(files, config, world))
            filler.costs = replace(filler.costs, arrangement=engines[0].model.arrangement)
        return engines[0].token_logps

    costs, entries_per_shard = inputs.costs, config.reference.rows_per_shard
    filler = StoreFiller(empty, load_scorer, world, scoring_tokens(config), costs, entries_per_shard, stops)
    report = _fill(config, inputs, filler, console).as_dict() | {"entries": str(empty.folder)}
    provider = StoredReference(filler.open_filled())
    for dataset, indices in inputs.visited:
        check_complete(provider.store, dataset, indices, world)
    audited, must_score = inputs.visited[0], bool(engines)
    if compatible:
        reused = world.on_main(lambda: count_reused(provider.store, inputs.visited))
        report["served"] = reused.entries
        console.say(f"reference: {_describe_reused(reused)}")
        if reused.audited is not None:
            audited = inputs.visited[reused.audited[0]][0], reused.audited[1]
            must_score = must_score or not is_start
    if config.reference.audit_pairs and must_score:
        objective, score = Objective(config.loss, provider), load_scorer()
        report["drift"] = check_drift(score, objective, *audited, filler.costs, config, world)
        drift = describe_drift(report["drift"])
        console.say(f"reference check passed: stored and newly computed log-probs are {drift}")
    for engine in engines:
        engine.free()
    if engines:
        report["peak_memory_bytes"] = max(world.gather(peak_memory_bytes(world.device)))
        reset_peak_memory(world.device)
    return provider, report, audited


def _fingerprint(config: RunConfig, files: ModelFiles, world: World) -> ReferenceFingerprint:
    """Return the fingerprint of the log-probs that this run computes; collective."""
    backend = choose_backend(config.model.attention, config.model.dtype, world.device)
    own = numerics_of(scored_model(config), backend, world.device)
    profile = agree_on_numerics(own, config.reference.numerics is Numerics.tolerant, world)
    label = model_label(config.reference.path or config.model.path, files.folder)
    return ReferenceFingerprint(files.digest, profile, label)


def _compatible(
    config: RunConfig,
    own: ReferenceFingerprint,
    inputs: Inputs | EvaluationInputs,
    world: World,
    console: Console,
) -> list[ReferenceFingerprint]:
    """Return the fingerprints of other numerics to use; a strict run only prints their number. Collective."""
    root = Path(config.reference.store)
    compatible = world.on_main(lambda: find_compatible(root, own))
    if config.reference.numerics is Numerics.tolerant or not compatible:
        return compatible
    unused = world.on_main(lambda: count_unused(root, own, compatible, inputs.visited))
    if unused.entries:
        console.say(
            f"reference: {unused.entries:,} of the log-probs to compute are stored under other numerics "
            f"({'; '.join(unused.differences)}); reference.numerics=tolerant uses them"
        )
    return []


def _fill(
    config: RunConfig, inputs: Inputs | EvaluationInputs, filler: StoreFiller, console: Console
) -> FillReport:
    """Compute and store the missing log-probs of all pairs of the run, and print a summary; collective."""
    filled = FillReport()
    several = len(inputs.visited) > 1
    for number, (dataset, indices) in enumerate(inputs.visited, 1):
        of_all = f", dataset {number} of {len(inputs.visited)}" if several else ""
        with console.progress(f"reference: scoring responses{of_all}", "pair") as progress:
            filled += filler.fill(dataset, indices, progress)
    console.say(describe_fill(filled))
    for name in sorted(filled.damaged):
        console.say(f"warning: reference: damaged or foreign file ignored: {config.reference.store}/{name}")
    return filled


def describe_fill(filled: FillReport) -> str:
    """Return the number of log-probs computed and reused in words."""
    text = f"reference: {counted(filled.computed, 'log-prob')} computed, {filled.hits:,} reused"
    return f"{text}, in {duration(filled.seconds)}" if filled.computed else text


def _describe_reused(reused: Reused) -> str:
    """Return the number of log-probs used of each numerics, in words."""
    return ", ".join(
        f"{counted(count, 'log-prob')} of this run's own numerics"
        if numerics == OWN_NUMERICS
        else f"{counted(count, 'log-prob')} computed with {numerics}"
        for numerics, count in reused.entries.items()
    )
