"""Write the page of a comparison: the result, and the answers side by side."""

from collections.abc import Iterator, Mapping
from typing import Any

from dpo_dist.foundation import files
from dpo_dist.foundation.text import number, percent_of, pluralize, with_interval, without_secrets
from dpo_dist.tools.compare.folder import ComparisonFolder
from dpo_dist.tools.pages.answers import AnswersRow, answer_blocks
from dpo_dist.tools.pages.blocks import Heading, PageBlock, Table, Text
from dpo_dist.tools.pages.render import page

_Row = Mapping[str, Any]

_ROOM = 4_000_000  # characters of texts
_VERDICTS = {1.0: "wins", 0.5: "ties", 0.0: "loses"}
_ANSWERS = (
    "The largest differences of scores come first. Texts of data and models can be offensive or private."
)
_SAMPLED = (
    "These answers are sampled at a temperature of {}, and unlikely words can make a small model look "
    "broken; sampling.temperature=0 takes the likeliest words."
)


def write_comparison_page(folder: ComparisonFolder, results: _Row) -> None:
    """Write `comparison.html` from the content of `comparison.json`, and from `answers.jsonl`."""
    results = without_secrets(results)
    rows = sorted(files.read_lines(folder.comparison_answers), key=_difference, reverse=True)
    judge = "no judge" if results["judge"] is None else f"judge: {results['judge']}"
    temperature = results["sampling"]["temperature"]
    blocks: list[PageBlock] = [
        Text(f"{pluralize(results['prompts'], 'prompt')}, {judge}."),
        Text("", "good", " ".join(headline(results))),
        _models(results),
        Text("Brackets: 95 % intervals over prompts. In a win rate a tie is half a win.", "note"),
        Heading("Answers"),
        Text(_ANSWERS, "note"),
    ]
    if temperature:
        blocks.append(Text(_SAMPLED.format(number(temperature)), "note"))
    second = results["models"][1]["name"]
    blocks += answer_blocks([(row, "; ".join(_notes(row, second))) for row in rows], _ROOM)
    files.write_text(folder.comparison_page, page("Comparison of two models", blocks))


def _difference(row: AnswersRow) -> float:
    """Return how far the scores of a prompt's answers differ."""
    first, second = (response["score"] for response in row["responses"].values())
    return 0.0 if first is None or second is None else abs(first - second)


def _models(results: _Row) -> Table:
    rows = []
    has_scores = any(model["score"] is not None for model in results["models"])
    for model in results["models"]:
        cells = [
            f"{model['name']}\n{model['path']}",
            f"{model['tokens']:.0f}",
            *(percent_of(model[share], results["prompts"]) for share in ("finished", "empty")),
        ]
        if has_scores:
            cells.append(with_interval(model["score"], model["score_interval"], ".3f"))
        rows.append(cells)
    return Table(["model", "tokens", "finished", "empty", *(["score"] if has_scores else [])], rows)


def comparison_table(results: _Row) -> list[str]:
    """Return the table of both models and the result, as lines."""
    judge = "" if results["judge"] is None else f", judged by {results['judge']}"
    title = f"comparison on {pluralize(results['prompts'], 'prompt')}{judge}"
    return [title, *_models(results).lines(), *headline(results)]


def headline(results: _Row) -> Iterator[str]:
    """Yield sentences: how often the second model wins, and what is to be known about that."""
    first, second = (model["name"] for model in results["models"])
    if results["rate"] is None:
        yield "Without a judge nothing says which answers are better."
    else:
        rate = with_interval(results["rate"], results["interval"], ".3f")
        yield f"{second} wins over {first} at a rate of {rate}."
        low, high = results["interval"] or (0.0, 1.0)
        if low <= 1 / 2 <= high:
            yield "This can be chance."
        ends = {"win": "wins", "tie": "ties", "loss": "losses"}
        counts = (pluralize(results[plural], noun, plural) for noun, plural in ends.items())
        yield f"Of {second}: {', '.join(counts)}."
    if results["rate"] is not None and results["not_judged"]:
        yield f"The judge gave no verdict on {pluralize(results['not_judged'], 'prompt')}."
    for model in results["models"]:
        if not model["finished"]:
            yield f"No answer of {model['name']} ends within sampling.max_new_tokens."
        if model["prompts_also_in_train"]:
            yield f"{model['name']} was trained on {model['prompts_also_in_train']:,} of the prompts."


def _notes(row: AnswersRow, second: str) -> Iterator[str]:
    """Yield the words by which prompts are searched."""
    yield f"source {row['source']}"
    if row["credit"] is not None:
        yield f"{second} {_VERDICTS[row['credit']]}"
    if not all(response["finished"] for response in row["responses"].values()):
        yield "an answer does not end"
