"""What reports on a run: alarms of its rows, and verdict, curves, page and worst pairs at its end."""

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from dpo_dist.foundation import files
from dpo_dist.foundation.errors import warn_on_bug
from dpo_dist.foundation.text import without_secrets
from dpo_dist.kit import (
    Inputs,
    MetricsRow,
    PairValues,
    PreferenceDataset,
    Reporting,
    Run,
    RunConfig,
    RunFolder,
)
from dpo_dist.tools.pages.charts import draw_curves
from dpo_dist.tools.pages.thumbnails import shown_prompt
from dpo_dist.tools.report.card import run_card
from dpo_dist.tools.report.run import write_page
from dpo_dist.tools.report.samples import prepare_samples
from dpo_dist.tools.report.verdict import RUN_RULES, sample_alarm, verdict
from dpo_dist.tools.sampling.keys import SamplingConfig
from dpo_dist.tools.tables import closing_table

_WORST = 8


def check_row(run: Run, before: Sequence[MetricsRow], row: MetricsRow) -> MetricsRow:
    """Return a row with the number of its alarms; warn of samples that begin to look wrong."""
    if "eval_samples/prompts" not in row:
        return row
    alarm = None
    is_new = False
    with warn_on_bug("the comparison of samples with earlier ones", run.warn):
        alarm = sample_alarm([*before, row])
        is_new = sample_alarm(before) is None
    if alarm is not None and is_new:
        headline = RUN_RULES[alarm.rule].text
        run.warn(f"{headline} after step {row['step']:,.0f}: {alarm.with_remedy}")
    return {**row, "eval_samples/alarms": float(alarm is not None)}


def closing_verdict(
    _folder: RunFolder, rows: Sequence[MetricsRow], summary: Mapping[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """Return the verdict for the summary, and its lines."""
    run_verdict = verdict(rows, summary)
    return {"verdict": run_verdict.as_dict()}, run_verdict.lines()


def write_report(run: Run, rows: Sequence[MetricsRow], summary: Mapping[str, Any]) -> list[str]:
    """Write curves and page, and return the closing table."""
    folder = run.folder
    lines: list[str] = []
    with warn_on_bug(folder.curves.name, run.warn):
        draw_curves(rows, folder.curves, folder.path.name)
    with warn_on_bug(folder.report.name, run.warn):
        write_page(folder, rows=rows)
    with warn_on_bug("the closing table", run.warn):
        lines += closing_table(folder, rows, summary)
    return lines


def worst_of_run(run: Run, inputs: Inputs, values: PairValues) -> None:
    """Write the worst pairs of the evaluation after the last step."""
    if not run.config.loss.is_one_sided:
        assert inputs.eval_set is not None, "evaluations have data"
        file = run.folder.last_evaluation.worst
        loss = run.config.loss
        options = {"is_unpaired": loss.is_unpaired, "has_scores": loss.of_scores}
        write_worst(file, values, inputs.eval_set, inputs.tokenizer, **options)


def write_worst(
    file: Path,
    values: PairValues,
    dataset: PreferenceDataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    is_unpaired: bool = False,
    has_scores: bool = False,
) -> None:
    """Write the pairs with the lowest negative margins as rows of answers; no file if there are none.

    For labelled records: good ones with the lowest, and bad ones with the highest rewards. `has_scores`:
    behind each response is the position of its score.
    """
    lines = []
    end = -1 if has_scores else None
    decode = partial(tokenizer.decode, skip_special_tokens=False)
    order = np.argsort(values.margin, kind="stable")
    worst = order[:_WORST]
    if is_unpaired:
        by_label = [values.tokens_chosen[order] > 0, values.tokens_rejected[order] > 0]
        worst = np.concatenate([order[is_of_label][: _WORST // 2] for is_of_label in by_label])
    for index in worst.tolist():
        if values.margin[index] < 0:
            example = dataset.example(index)
            prompt, images = shown_prompt(example, dataset.images)
            row: dict[str, Any] = {
                "origin": without_secrets(str(dataset.origin(index))),
                "prompt": decode(prompt.tolist()),
            }
            if is_unpaired:
                label = "good" if values.tokens_chosen[index] > 0 else "bad"
                reward = float(values.margin[index])
                row["reward"] = reward if label == "good" else -reward
                sides = {label: example.responses[0]}
            else:
                row["margin"] = float(values.margin[index])
                sides = {"chosen": example.responses[0], "rejected": example.responses[-1]}
            row["responses"] = {side: {"text": decode(ids[:end].tolist())} for side, ids in sides.items()}
            if images:
                row["images"] = images
            lines.append(json.dumps(row) + "\n")
    file.unlink(missing_ok=True)  # of an earlier end, in a longer run
    if lines:
        files.write_text(file, "".join(lines))


_MOST_SENT = 8


def sent_samples(config: RunConfig) -> int:
    """Return how many rows of samples trackers get: none unless the user asked for samples."""
    return _MOST_SENT if config.section_of(SamplingConfig).prompts else 0


reporting = partial(
    Reporting,
    prepare_samples=prepare_samples,
    sent_samples=sent_samples,
    check_row=check_row,
    write_worst=worst_of_run,
    closing_verdict=closing_verdict,
    run_card=run_card,
    write_page=write_page,
    write_report=write_report,
)
"""Everything that reports on a run: it takes the user's `on_row` and `on_step`."""
