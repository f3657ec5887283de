"""Show the samples of a run, and the worst pairs of an evaluation, on its page."""

from itertools import islice
from pathlib import Path

from dpo_dist.foundation.files import read_lines
from dpo_dist.foundation.text import number, pluralize
from dpo_dist.kit import RunFolder, checkpoint_step
from dpo_dist.tools.pages.answers import AnswersRow, answer_blocks
from dpo_dist.tools.pages.blocks import PageBlock, Text, titled_section

_MOST_ROWS = 200
_MOST_SHOWN = 10
_SECTION_CHARACTERS = 900_000
CAUTION = "Texts of data and models can be offensive or private."


def samples_section(folder: RunFolder) -> list[PageBlock]:
    """Return a page's section about a run's samples; empty without samples.

    It has responses of the reference, and of the policy at the last, the previous and the first evaluation.
    """
    files = _files(folder)
    steps = list(files)
    rows_of_steps = dict[int, list[AnswersRow]]()
    for step in dict.fromkeys((*steps[:2], *steps[-1:])):
        rows_of_steps[step] = list(islice(read_lines(files[step]), _MOST_ROWS))
    last = rows_of_steps[steps[0]] if steps else []
    if not last:
        return []
    by_prompt = {step: {row["prompt_id"]: row for row in rows} for step, rows in rows_of_steps.items()}
    prompts = []
    for row in last[:_MOST_SHOWN]:
        responses = {}
        if "reference" in row["responses"]:
            responses["reference"] = row["responses"]["reference"]
        for step, rows in by_prompt.items():
            earlier = rows.get(row["prompt_id"])
            if earlier is None:
                continue
            response = earlier["responses"]["policy"]
            if earlier is row or response["text"] not in [each["text"] for each in responses.values()]:
                responses[f"step {step:,}"] = response
        prompts.append(({**row, "responses": responses}, str(row["source"])))
    held_out = pluralize(len(last), "held-out prompt")
    where = f"Responses of the policy after step {steps[0]:,} to {held_out}"
    blocks = [
        Text(f"{where}; all are in samples/{files[steps[0]].name}."),
        Text(f"Below: the first {_MOST_SHOWN}. {CAUTION}", "note"),
    ]
    return titled_section("Samples", [*blocks, *answer_blocks(prompts, _SECTION_CHARACTERS)])


def _files(folder: RunFolder) -> dict[int, Path]:
    """Return the sample files by step, the newest first."""
    files = {}
    for file in folder.samples.glob("step-*.jsonl"):
        step = checkpoint_step(file.stem)
        if step is not None:
            files[step] = file
    return dict(sorted(files.items(), reverse=True))


def worst_pairs(file: Path) -> list[PageBlock]:
    """Return the pairs in an evaluation's file of worst pairs."""
    prompts = []
    for row in read_lines(file):
        metric = "margin" if "margin" in row else "reward"
        prompts.append((row, f"{row['origin']}: {metric} {number(row[metric], 3)}"))
    return answer_blocks(prompts, _SECTION_CHARACTERS)
