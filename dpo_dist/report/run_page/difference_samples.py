"""Section of two runs about their responses to the same held-out prompts."""

from collections.abc import Mapping
from typing import Any

from dpo_dist.config.run_folder import RunFolder
from dpo_dist.number_text import counted
from dpo_dist.report.blocks import note, section
from dpo_dist.report.json_rows import text_of
from dpo_dist.report.run_page.difference_results import LABELS, Two
from dpo_dist.report.run_page.samples import model_notes, sample_files, sample_rows
from dpo_dist.report.side_by_side import LONGEST, Response, prompt_title, side_by_side
from dpo_dist.report.word_diff import difference

Row = Mapping[str, Any]

_MOST_SHOWN = 8
_OPEN = 2
_LONGEST = 6000


def samples_of_both(two: Two) -> str:
    """Return the last responses of both runs to common prompts, the most different first."""
    (first_step, first), (second_step, second) = (_last_samples(facts.folder) for facts in two.facts)
    common = [(row, second[name]) for name, row in first.items() if name in second]
    common.sort(key=lambda rows: _similarity(*rows))
    steps = first_step, second_step
    items = [_item(rows, steps, is_open=number < _OPEN) for number, rows in enumerate(common[:_MOST_SHOWN])]
    explained = (
        f"Last responses (steps {first_step:,} and {second_step:,}) to {counted(len(items), 'prompt')} of "
        f"{len(common):,} that both runs answered, those that differ most first. Marked words are not in the "
        "response of A. Texts of data and models can be offensive or private."
    )
    return section("samples", "Responses of both", note(explained), *items) if items else ""


def _item(rows: tuple[Row, Row], steps: tuple[int, int], *, is_open: bool) -> str:
    prompt, responses = text_of(rows[0], "prompt") or "", _responses(rows, steps)
    return (
        f'<details class="sample"{" open" if is_open else ""}>'
        f'<summary dir="auto">{prompt_title(prompt)}</summary>'
        f"{side_by_side(prompt, responses, responses[0].label, _LONGEST)}</details>"
    )


def _last_samples(folder: RunFolder) -> tuple[int, dict[str, Row]]:
    """Return the last step with samples and its rows by prompt."""
    for step, file in sorted(sample_files(folder).items(), reverse=True):
        found = (row for row in sample_rows(file) if row is not None and isinstance(row.get("policy"), str))
        rows = {str(row.get("prompt_id")): row for row in found}
        if rows:
            return step, rows
    return 0, {}


def _similarity(first: Row, second: Row) -> float:
    return difference(str(first["policy"])[:LONGEST], str(second["policy"])[:LONGEST]).similarity


def _responses(rows: tuple[Row, Row], steps: tuple[int, int]) -> list[Response]:
    """Return both policies' responses, the references' (one if they are equal), and the chosen one."""
    policies = [
        Response(f"{label}, step {step}", text_of(row, "policy"), model_notes(row, "policy"))
        for label, row, step in zip(LABELS, rows, steps, strict=True)
    ]
    first, second = (text_of(row, "reference") for row in rows)
    references = [Response("reference", first, model_notes(rows[0], "reference"))]
    if first != second:
        references = [
            Response(f"reference of {label}", text_of(row, "reference"), model_notes(row, "reference"))
            for label, row in zip(LABELS, rows, strict=True)
        ]
    return [*policies, *references, Response("chosen", text_of(rows[0], "chosen"))]
