"""The page about two runs: the settings that differ, and their metrics side by side."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from dpo_dist.config.run_folder import RunFolder
from dpo_dist.foundation import files
from dpo_dist.foundation.text import duration, number, size
from dpo_dist.insight.evaluation import ALL, results_name
from dpo_dist.insight.pages.render import estimate, flat, page
from dpo_dist.insight.pages.run import PageFacts, verdict_of
from dpo_dist.insight.verdict.facts import ACCURACY, MARGIN
from dpo_dist.objective.metrics import ENTROPIES, PAIR_METRICS

Two = Sequence[PageFacts]

_ABSENT = "not recorded"
_OF_NO_RESULT = ("run.", "console.", "tracking.")
_OF_NO_POLICY = ("samples/reference_", "samples/prompts", "samples/alarms")


def write_difference(folders: tuple[RunFolder, RunFolder], output: Path | None = None) -> Path:
    """Write the page about two runs to `output` or to the working folder, and return its path."""
    two, names = [PageFacts(one) for one in folders], [one.path.resolve().name for one in folders]
    runs = [
        (label, name, facts.summary.get("exit") or "not ended", verdict_of(facts))
        for label, name, facts in zip("AB", names, two, strict=True)
    ]
    differing = list(_differing(*(dict(flat(facts.config)) for facts in two)))
    others = [row for row in differing if row[0].startswith(_OF_NO_RESULT)]
    settings = [row for row in differing if row not in others]
    others += _differing(*(dict(flat(facts.environment)) for facts in two))
    is_evaluated = all(facts.run.evaluations for facts in two)
    html = page(
        "difference.jinja",
        " and ".join(names),
        runs=runs,
        settings=settings,
        others=others,
        warnings=list(_warnings(two)),
        of="the last evaluation" if is_evaluated else "the last logged steps",
        results=[*_metrics(two), *_amounts(two)],
    )
    path = output or Path("-".join(["difference", *names]) + ".html")
    files.write_text(path, html)
    return path


def _differing(first: Mapping[str, str], second: Mapping[str, str]) -> Iterator[tuple[str, str, str]]:
    """Yield the keys with different values."""
    for key in dict.fromkeys([*first, *second]):
        values = first.get(key, _ABSENT), second.get(key, _ABSENT)
        if values[0] != values[1]:
            yield key, *values


def _warnings(two: Two) -> Iterator[str]:
    """Yield the reasons for which values of the two runs are not comparable."""
    identities = [facts.state.get("identity") or {} for facts in two]

    def differ(*values: object) -> bool:
        return None not in values and values[0] != values[1]

    if differ(*(identity.get("eval_data") for identity in identities)):
        yield "The runs were evaluated on different data: their metrics are not comparable."
    if differ(*(identity.get("reference") for identity in identities)):
        yield "Their reference models differ: rewards, margins and accuracies are relative to other models."
    if any(differ(*(facts.setting(key) for facts in two)) for key in ("loss.kind", "loss.terms")):
        yield "Their losses differ: values of the loss are not comparable."
    if differ(*(facts.setting("loss.beta") for facts in two)):
        yield "Their beta differs: rewards and margins are multiples of it. Compare accuracies and log-probs."


def _metrics(two: Two) -> Iterator[tuple[object, ...]]:
    """Yield the last metrics of both runs with their difference and whether their intervals overlap."""
    is_evaluated = all(facts.run.evaluations for facts in two)
    rows = [row for facts in two for row in (facts.run.evaluations if is_evaluated else facts.run.steps)[-1:]]
    if len(rows) < len(two):
        return
    ends = [_intervals(facts) if is_evaluated else {} for facts in two]
    samples = (key for key in rows[0] if key.startswith("samples/") and not key.startswith(_OF_NO_POLICY))
    by_source = (key for key in rows[0] if key.startswith((f"{ACCURACY}/", f"{MARGIN}/")))
    for key in (*PAIR_METRICS, *ENTROPIES, *samples, *by_source):
        if all(key in row for row in rows):
            own = [each.get(key) for each in ends]
            cells = [estimate(row[key], interval) for row, interval in zip(rows, own, strict=True)]
            overlap = ""
            if own[0] and own[1]:
                is_common = max(own[0][0], own[1][0]) <= min(own[0][1], own[1][1])
                overlap = "overlap" if is_common else "do not overlap"
            yield key, *cells, f"{rows[1][key] - rows[0][key]:+.3g}", overlap


def _intervals(facts: PageFacts) -> Mapping[str, Sequence[float]]:
    """Return the intervals of the last evaluation by metric, also of sources."""
    found = {key.removeprefix("eval_"): ends for key, ends in facts.intervals(ALL).items()}
    for label in facts.by_source:
        own = facts.intervals(results_name(label))
        found |= {f"{key.removeprefix('eval_')}/{label}": ends for key, ends in own.items()}
    return found


def _amounts(two: Two) -> Iterator[tuple[object, ...]]:
    """Yield time, speed and memory of both runs, as far as both have them, with their ratio."""
    for name, form in (
        ("train_seconds", duration),
        ("pairs_per_second", number),
        ("peak_memory_bytes", size),
    ):
        first, second = (facts.summary.get(name) for facts in two)
        if first and second:
            yield name.replace("_", " "), form(first), form(second), f"\u00d7 {number(second / first, 3)}", ""
