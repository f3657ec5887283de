"""Filters of prompts by the judge's verdict against the base, the largest differences of scores first."""

import heapq
from collections.abc import Iterable, Iterator, Sequence

from dpo_dist.report.comparison.results import Model, Results, finite, response_of
from dpo_dist.report.json_rows import Row
from dpo_dist.report.side_by_side import cut

_MOST_MODELS = 8
_MOST_ORDERED = 50
"""Prompts of a filter that are ordered by differences; the others follow in the order of the data."""
_VERDICTS = {1.0: "wins over", 0.5: "ties with", 0.0: "loses to"}


def all_labels(results: Results) -> list[str]:
    """Return the labels of all filters by verdict, in their order."""
    return [_label(model, results, credit) for model in _filtered(results) for credit in _VERDICTS]


def verdict_labels(row: Row, results: Results) -> Iterator[str]:
    """Yield the labels of the verdicts in a row of `answers.jsonl`."""
    for model in _filtered(results):
        credit = _credit(row, model, results)
        if credit is not None:
            yield _label(model, results, credit)


class Places:
    """Places of prompts by the differences of scores, as classes that `order_style` sorts."""

    def __init__(self, results: Results):
        self._results = results
        self._differences: dict[int, list[tuple[float, int]]] = {}

    def add(self, line: int, row: Row) -> None:
        """Add the row of a line."""
        for at, model in enumerate(_filtered(self._results)):
            if difference := _difference(row, model, self._results):
                self._differences.setdefault(at, []).append((-abs(difference), line))

    def classes(self) -> dict[int, list[str]]:
        """Return by line the classes of its places, of each model's largest differences."""
        found: dict[int, list[str]] = {}
        for at, of_model in self._differences.items():
            for place, (_, line) in enumerate(heapq.nsmallest(_MOST_ORDERED, of_model)):
                found.setdefault(line, []).append(_class(at, place))
        return found


def order_style(labels: Sequence[str], classes: Iterable[Iterable[str]], results: Results) -> str:
    """Return the style sheet by which a filter by verdict shows the largest differences first.

    Args:
        labels: of the filters, which are called f0, f1, ...
        classes: of `Places`.
        results: of the comparison.
    """
    known = {name for of_line in classes for name in of_line}
    style = ["", ".prompts { display: flex; flex-direction: column; } .prompts > * { flex: none; }"]
    for at, model in enumerate(_filtered(results)):
        own = [_label(model, results, credit) for credit in _VERDICTS]
        filters = [f"#filter-f{labels.index(label)}" for label in own if label in labels]
        used = [place for place in range(_MOST_ORDERED) if _class(at, place) in known]
        if filters and used:
            style += [f".{_class(at, place)} {{ --order{at}: {place}; }}" for place in used]
            selected = f":is({', '.join(filters)}):checked ~ .prompts > *"
            style.append(f"{selected} {{ order: var(--order{at}, {_MOST_ORDERED}); }}")
    return "\n".join(style)


def _filtered(results: Results) -> Sequence[Model]:
    return results.models[1 : _MOST_MODELS + 1]


def _class(model: int, place: int) -> str:
    return f"m{model}p{place}"


def _credit(row: Row, model: Model, results: Results) -> float | None:
    """Return 1 for a response that is better than that of the base, 0 for a worse one, 0.5 for a tie.

    Rows of versions without verdicts have scores or nothing.
    """
    for verdict in row.get("verdicts") or ():
        if isinstance(verdict, dict) and (verdict.get("first"), verdict.get("second")) == (
            results.base,
            model.name,
        ):
            of_base = finite(verdict.get("credit"))
            return None if of_base is None else 1 - of_base
    difference = _difference(row, model, results)
    return None if difference is None else 0.5 + 0.5 * ((difference > 0) - (difference < 0))


def _difference(row: Row, model: Model, results: Results) -> float | None:
    """Return the score of a model's response minus that of the base; None without one of them."""
    score, base = (finite(response_of(row, name).get("score")) for name in (model.name, results.base))
    return None if score is None or base is None else score - base


def _label(model: Model, results: Results, credit: float) -> str:
    verdict = _VERDICTS.get(credit, _VERDICTS[0.5])
    return f"{cut(model.name)} {verdict} {cut(results.base)}"
