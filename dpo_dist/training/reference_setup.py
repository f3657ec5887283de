"""The stored reference of a run: compute what the store lacks, and re-score a sample of what it has."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from dpo_dist.config.schema import Numerics, RunConfig
from dpo_dist.data.dataset import PreferenceDataset
from dpo_dist.data.sampler import Indices
from dpo_dist.distributed.device_memory import peak_memory_bytes, reset_peak_memory
from dpo_dist.distributed.world import World
from dpo_dist.model.attention_backend import choose_backend
from dpo_dist.model.numerics import numerics_of
from dpo_dist.reference.compatible import agree_on_numerics, count_reused, count_unused, find_compatible
from dpo_dist.reference.digest import ModelFiles
from dpo_dist.reference.engine import ReferenceEngine, load_digested, scored_model, scoring_tokens
from dpo_dist.reference.fill import FillReport, OpenStore, check_complete, fill_store, open_filled
from dpo_dist.reference.fingerprint import ReferenceFingerprint
from dpo_dist.reference.providers import StoredReference
from dpo_dist.reference.scoring import Scorer
from dpo_dist.reference.store import LogpStore
from dpo_dist.report.console import Console
from dpo_dist.training.data_setup import Inputs
from dpo_dist.training.reference_check import describe_drift, pass_gate
from dpo_dist.training.step import Objective

Audited = tuple[PreferenceDataset, Indices]


def stored_reference(
    config: RunConfig,
    inputs: Inputs,
    files: ModelFiles,
    label: str,
    is_start: bool,
    world: World,
    console: Console,
) -> tuple[StoredReference, dict[str, Any], Audited]:
    """The store with every row that the run visits; what it lacks is computed, and then the engine freed.

    A sample of all rows is scored again while the engine is there. Rows of other numerics are scored again in
    any case: by the policy if it starts from the reference, else by an engine that is loaded for it.

    Args:
        files: of the reference model, digested.
        label: its name for people.
        is_start: whether the policy starts from it.

    Returns:
        The provider; what getting it ready took, for summary.json; and the rows to audit.
    """
    backend = choose_backend(config.model.attention, config.model.dtype, world.device)
    is_tolerant = config.reference.numerics is Numerics.tolerant
    own = numerics_of(scored_model(config), backend, world.device)
    space = ReferenceFingerprint(files.digest, agree_on_numerics(own, is_tolerant, world), label)
    compatible = _compatible(config, space, inputs, world, console)
    open_store = partial(LogpStore.open, Path(config.reference.store), space, compatible=compatible)
    engines: list[ReferenceEngine] = []

    def scorer() -> Scorer:
        if not engines:
            engines.append(load_digested(files, config, world))
        return engines[0].token_logps

    filled = _fill(config, inputs, open_store, scorer, world, console)
    report = filled.as_dict()
    provider = StoredReference(open_filled(open_store, filled.shards, world))
    for dataset, rows in inputs.visited:
        check_complete(provider.store, dataset, rows, world)
    served = world.on_main(lambda: count_reused(provider.store, inputs.visited)) if compatible else None
    audited = inputs.visited[0]
    audits_kin = served is not None and served.audited is not None
    if served is not None:
        report["served"] = served.rows
        console.say(f"reference: log-probs used by numerics: {_listed(served.rows)}")
        if served.audited is not None:
            audited = inputs.visited[served.audited[0]][0], served.audited[1]
    if config.reference.audit_pairs and (engines or (audits_kin and not is_start)):
        objective = Objective(config.loss, provider)
        report["drift"] = pass_gate(scorer(), objective, *audited, inputs.costs, config, world)
        console.say(f"reference: {describe_drift(report['drift'])}")
    for engine in engines:
        engine.free()
    if engines:
        report["peak_memory_bytes"] = max(world.gather(peak_memory_bytes(world.device)))
        reset_peak_memory(world.device)
    return provider, report, audited


def _compatible(
    config: RunConfig, space: ReferenceFingerprint, inputs: Inputs, world: World, console: Console
) -> list[ReferenceFingerprint]:
    """The spaces of other numerics whose rows serve; a strict run has none, and tells of them. Collective."""
    root = Path(config.reference.store)
    compatible = world.on_main(lambda: find_compatible(root, space))
    if config.reference.numerics is Numerics.tolerant or not compatible:
        return compatible
    unused = world.on_main(lambda: count_unused(root, space, compatible, inputs.visited))
    if unused.rows:
        console.say(
            f"reference: {unused.rows:,} of the log-probs to compute are stored under other numerics "
            f"({'; '.join(unused.differences)}); reference.numerics=tolerant uses them"
        )
    return []


def _fill(
    config: RunConfig,
    inputs: Inputs,
    open_store: OpenStore,
    scorer: Callable[[], Scorer],
    world: World,
    console: Console,
) -> FillReport:
    """Compute what the store lacks of the rows that the run visits, and tell; collective."""
    filled = FillReport()
    for dataset, rows in inputs.visited:
        with console.progress("reference", "pair") as progress:
            filled += fill_store(
                open_store,
                dataset,
                rows,
                scorer,
                world,
                scoring_tokens(config),
                inputs.costs,
                config.reference.rows_per_shard,
                progress,
                filled.shards,
            )
    console.say(f"reference: {filled.computed:,} log-probs computed, {filled.hits:,} reused")
    for name in sorted(filled.damaged):
        console.say(f"reference: damaged or foreign file ignored: {config.reference.store}/{name}")
    return filled


def _listed(counts: dict[str, int]) -> str:
    return "; ".join(f"{count:,} of {numerics}" for numerics, count in counts.items())
