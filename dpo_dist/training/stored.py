"""The stored reference of a run: what the store lacks is computed, what it serves is audited."""

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from dpo_dist.config.schema import Numerics, RunConfig
from dpo_dist.data.dataset import PairDataset
from dpo_dist.data.schedule import Rows
from dpo_dist.distributed.runtime import World
from dpo_dist.model.kernels import choose_backend
from dpo_dist.model.load import numerics_of
from dpo_dist.reference.engine import ReferenceEngine, load_reference, scored_model, scoring_tokens
from dpo_dist.reference.fill import FillReport, Scorer, fill_store, open_filled
from dpo_dist.reference.key import ReferenceSpace
from dpo_dist.reference.kin import kin_of, rows_served, unused_rows
from dpo_dist.reference.provider import StoredReference
from dpo_dist.reference.store import LogpStore
from dpo_dist.report.console import Console
from dpo_dist.training.gate import pass_gate
from dpo_dist.training.inputs import Inputs
from dpo_dist.training.step import Objective

Audited = tuple[PairDataset, Rows]


def stored_reference(
    config: RunConfig,
    inputs: Inputs,
    folder: Path,
    model: tuple[str, str],
    is_start: bool,
    world: World,
    console: Console,
) -> tuple[StoredReference, dict[str, Any], Audited]:
    """The store with every row that the run visits; what it lacks is computed, and then the engine freed.

    A sample of all rows is scored again while the engine is there. Rows of other numerics are scored again in
    any case: by the policy if it starts from the reference, else by an engine that is loaded for it.

    Args:
        folder: of the reference model.
        model: its digest, and its name for people.
        is_start: whether the policy starts from it.

    Returns:
        The provider; what getting it ready took, for summary.json; and the rows to audit.
    """
    backend = choose_backend(config.model.attention, config.model.dtype, world.device)
    digest, label = model
    space = ReferenceSpace(digest, numerics_of(scored_model(config), backend, world.device), label)
    kin = _serving_kin(config, space, inputs, world, console)
    open_store = partial(LogpStore.open, Path(config.reference.store), space, kin=kin)
    engines: list[ReferenceEngine] = []

    def scorer() -> Scorer:
        if not engines:
            engines.append(load_reference(folder, config, world))
        return engines[0].token_logps

    report = _fill(config, inputs, open_store, scorer, world, console).as_dict()
    provider = StoredReference(open_filled(open_store, world))
    served = world.on_main(lambda: rows_served(provider.store, inputs.visited)) if kin else None
    audited = inputs.visited[0]
    audits_kin = served is not None and served.audited is not None
    if served is not None:
        report["served"] = served.rows
        console.say(f"reference: rows by numerics: {json.dumps(served.rows)}")
        if served.audited is not None:
            audited = inputs.visited[served.audited[0]][0], served.audited[1]
    if config.reference.audit_pairs and (engines or (audits_kin and not is_start)):
        objective = Objective(config.loss, provider)
        report["drift"] = pass_gate(scorer(), objective, *audited, inputs.costs, config, world)
        console.say(f"reference: drift of stored rows: {json.dumps(report['drift'])}")
    for engine in engines:
        engine.free()
    return provider, report, audited


def _serving_kin(
    config: RunConfig, space: ReferenceSpace, inputs: Inputs, world: World, console: Console
) -> list[ReferenceSpace]:
    """The spaces of other numerics whose rows serve; a strict run has none, and tells of them. Collective."""
    root = Path(config.reference.store)
    kin = world.on_main(lambda: kin_of(root, space))
    if config.reference.numerics is Numerics.tolerant or not kin:
        return kin
    unused = world.on_main(lambda: unused_rows(root, space, kin, inputs.visited))
    if unused.rows:
        console.say(
            f"reference: {unused.rows} of the rows to compute are stored under other numerics "
            f"({'; '.join(unused.differences)}); reference.numerics=tolerant lets them serve"
        )
    return []


def _fill(
    config: RunConfig,
    inputs: Inputs,
    open_store: Callable[[Sequence[str] | None], LogpStore],
    scorer: Callable[[], Scorer],
    world: World,
    console: Console,
) -> FillReport:
    """Compute what the store lacks of the rows that the run visits, and tell; collective."""
    filled = FillReport()
    for dataset, rows in inputs.visited:
        with console.bar("reference", 0, 0, "pair") as bar:
            filled += fill_store(
                open_store,
                dataset,
                rows,
                scorer,
                world,
                scoring_tokens(config),
                inputs.costs,
                config.reference.rows_per_shard,
                partial(_show_progress, bar),
            )
    console.say(f"reference: {filled.hits} rows found in the store, {filled.computed} computed")
    for name in sorted(filled.damaged):
        console.say(f"reference: damaged or foreign, passed over: {config.reference.store}/{name}")
    return filled


def _show_progress(bar: Any, done: int, total: int) -> None:
    bar.total = total
    bar.update(done - bar.n)
