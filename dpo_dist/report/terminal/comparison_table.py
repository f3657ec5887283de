"""A comparison of models as tables for the terminal."""

from collections.abc import Mapping, Sequence
from typing import Any

from dpo_dist.number_text import counted, percent
from dpo_dist.report.terminal.text_table import aligned, with_interval

Row = Mapping[str, Any]
_MOST_RATES = 6
"""Win rates without the base that are printed; those of more models are on the page only."""


def comparison_table(results: Row) -> list[str]:
    """Return the lines of the tables: the models with 95 % intervals, then the win rates of every two.

    Args:
        results: the content of comparison.json.
    """
    base = results["base"]
    rates = {win["second"]: win for win in results["wins"] if win["first"] == base}
    has_scores = any(model["score"] is not None for model in results["models"])
    titles = ["model", "tokens", "finished", "refusals", "lists", f"KL to {base}"]
    rows = [[*titles, *(["score"] if has_scores else []), *([f"wins over {base}"] if rates else [])]]
    for model in results["models"]:
        style = model["style"]
        cells = [
            model["name"],
            f"{style['length']:.0f}",
            *map(percent, (style["finished"], style["refusals"])),
        ]
        cells += [percent(style["lists"]), _or_dash(model["kl"], model["kl_interval"], ".2f")]
        if has_scores:
            cells.append(_or_dash(model["score"], model["score_interval"], ".3f"))
        if rates:
            cells.append(_over_base(rates.get(model["name"])))
        rows.append(cells)
    judge = "" if results["judge"] is None else f", judged by {results['judge']}"
    lines = [f"comparison on {results['prompts']:,} held-out prompts{judge}", *aligned(rows)]
    others = [win for win in results["wins"] if win["first"] != base]
    if len(others) <= _MOST_RATES:
        lines += [f"{win['second']} over {win['first']}: {_over_base(win)}" for win in others]
    else:
        lines.append(f"{len(others)} more win rates, of models without {base}, are on the page")
    return lines + _notes(results)


def _notes(results: Row) -> list[str]:
    """Return lines about what limits the results."""
    notes = []
    temperature = results["sampling"]["temperature"]
    if temperature != 1 and any(model["kl"] for model in results["models"]):
        notes.append(f"note: responses at temperature {temperature:g}: the KL has a bias, at 1 it has none")
    for model in results["models"]:
        number = model["prompts_encoded_differently"]
        if number:
            notes.append(
                f"note: {model['name']} encodes {number:,} prompts as other tokens than {results['base']}: "
                "another chat template or tokenizer"
            )
    if results["wins"]:
        ties = sum(win["ties"] for win in results["wins"])
        notes.append(f"win rates count {counted(ties, 'tie')} as half" if ties else "win rates: no ties")
    left = sum(results["not_judged"].values())
    return notes + (
        [f"note: not counted, because without a verdict: {counted(left, 'comparison')}"] if left else []
    )


def _over_base(win: Row | None) -> str:
    """Return the win rate of the second model."""
    if win is None:
        return ""
    ends = win["interval"]
    return _or_dash(1 - win["rate"], None if ends is None else [1 - ends[1], 1 - ends[0]], ".3f")


def _or_dash(value: float | None, ends: Sequence[float] | None, form: str) -> str:
    return "-" if value is None else with_interval(value, ends, form)
