"""Show the samples of a run and of several runs, and the worst pairs of an evaluation, on their pages."""

import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path

from dpo_dist.foundation.files import read_lines
from dpo_dist.foundation.text import number, pluralize
from dpo_dist.kit import RunFolder, checkpoint_step
from dpo_dist.tools.pages.answers import AnswersRow, answer_blocks
from dpo_dist.tools.pages.blocks import PageBlock, Text, titled_section
from dpo_dist.tools.text_facts import text_facts

REPEATED = 0.5
DISTINCT = 0.5
LONGER = 2.0
_MOST_ROWS = 200
_MOST_WORST = 6
_MOST_SHOWN = 10
_MEASURED_CHARACTERS = 2000
_SECTION_CHARACTERS = 900_000
CAUTION = "Texts of data and models can be offensive or private."


def faults(responses: AnswersRow) -> list[str]:
    """Return the reasons to look at a policy's response; the first is the worst."""
    policy = responses["policy"]
    tokens = policy["tokens"]
    reference_tokens = responses.get("reference", policy)["tokens"]
    facts = text_facts(policy["text"][:_MEASURED_CHARACTERS], tokens, is_finished=True)
    ratio = tokens / reference_tokens if reference_tokens else 1.0
    reasons = {
        "is empty": facts.empty,
        "does not end": not policy["finished"],
        "repeats itself": facts.longest_repeat > REPEATED or (facts.distinct_3 or 1.0) < DISTINCT,
        f"is {ratio:.1f} times as long as the reference's": ratio >= LONGER,
    }
    return [reason for reason, applies in reasons.items() if applies]


def choose(rows: Sequence[AnswersRow]) -> list[tuple[AnswersRow, str]]:
    """Return rows to show, each with the reason: those with most faults, and some at random."""
    with_faults = [(row, faults(row["responses"])) for row in rows]
    faulty = [each for each in with_faults if each[1]]
    worst = sorted(faulty, key=lambda each: (-len(each[1]), -each[0]["responses"]["policy"]["tokens"]))
    worst = worst[:_MOST_WORST]
    others = [row for row, reasons in with_faults if (row, reasons) not in worst]
    sample = random.Random(0).sample(others, min(len(others), _MOST_SHOWN - len(worst)))  # noqa: S311
    choice = [(row, f"the response {', '.join(reasons)}") for row, reasons in worst]
    return [*choice, *((row, "chosen at random") for row in sample)]


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
    for row, reason in choose(last):
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
        prompts.append(({**row, "responses": responses}, f"{row['source']}: {reason}"))
    held_out = pluralize(len(last), "held-out prompt")
    where = f"Responses of the policy after step {steps[0]:,} to {held_out}"
    blocks = [
        Text(f"{where}; all are in samples/{files[steps[0]].name}."),
        Text(f"Below: the responses with most faults, and some at random. {CAUTION}", "note"),
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


def samples_side_by_side(runs: Mapping[str, RunFolder]) -> list[PageBlock]:
    """Return the section of prompts that several runs share, with each run's response after its last step."""
    responses_of_prompts = defaultdict[str, dict[str, AnswersRow]](dict)
    last: dict[str, AnswersRow] = {}
    for label, folder in runs.items():
        for file in islice(_files(folder).values(), 1):
            for row in islice(read_lines(file), _MOST_ROWS):
                name = f"{label} after step {row['step']:,}"
                responses_of_prompts[row["prompt_id"]][name] = row["responses"]["policy"]
                last[row["prompt_id"]] = row
    prompts = []
    for key, responses in responses_of_prompts.items():
        if len(responses) > 1:
            prompts.append(({**last[key], "responses": responses}, str(last[key]["source"])))
    if not prompts:
        return []
    note = Text(f"Responses of the runs to the same held-out prompts. {CAUTION}", "note")
    return titled_section("Samples", [note, *answer_blocks(prompts[:_MOST_SHOWN], _SECTION_CHARACTERS)])


def worst_pairs(file: Path) -> list[PageBlock]:
    """Return the pairs in an evaluation's file of worst pairs."""
    prompts = []
    for row in read_lines(file):
        metric = "margin" if "margin" in row else "reward"
        prompts.append((row, f"{row['origin']}: {metric} {number(row[metric], 3)}"))
    return answer_blocks(prompts, _SECTION_CHARACTERS)
