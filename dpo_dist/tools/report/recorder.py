"""Record a run on rank 0: write metrics rows to files and trackers, and the report at the end."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from dpo_dist.foundation import files
from dpo_dist.foundation.errors import RunOutcome, warn_on_bug
from dpo_dist.foundation.text import without_secrets
from dpo_dist.kit import (
    LAST_EVALUATION,
    MetricsLog,
    MetricsRow,
    PreferenceDataset,
    Run,
    RunConfig,
    write_evaluation,
)
from dpo_dist.objective.metrics import PairColumn, PairValues
from dpo_dist.tools.pages.charts import draw_curves
from dpo_dist.tools.pages.thumbnails import shown_prompt
from dpo_dist.tools.report.card import run_card
from dpo_dist.tools.report.facts import data_findings
from dpo_dist.tools.report.run import write_page
from dpo_dist.tools.report.samples import prepare_samples
from dpo_dist.tools.report.verdict import RUN_RULES, sample_alarm, verdict
from dpo_dist.tools.sampling.keys import SamplesConfig
from dpo_dist.tools.tables import closing_table
from dpo_dist.training.reporting.protocols import OnMoment, Reporting
from dpo_dist.training.reporting.recorder import OnRow, PlainRecorder, opened_trackers
from dpo_dist.training.start.inputs import Inputs

_WORST = 8


@dataclass(frozen=True)
class RunRecorder(PlainRecorder):
    """Also warns of samples that look wrong, and writes the verdict, curves and the page."""

    def row(self, row: MetricsRow, margins: PairColumn | None = None) -> None:
        """Write a metrics row and send it to the trackers; warn if its samples look wrong."""
        alarm = None
        is_new = False
        if "eval_samples/prompts" in row:
            with warn_on_bug("the comparison of samples with earlier ones", self.run.warn):
                before = self.metrics.sample.evaluations
                alarm = sample_alarm([*before, row])
                is_new = sample_alarm(before) is None
            row = {**row, "eval_samples/alarms": float(alarm is not None)}
        super().row(row, margins)
        if alarm is not None and is_new:
            headline = RUN_RULES[alarm.rule].text
            self.run.warn(f"{headline} after step {row['step']:,.0f}: {alarm.with_remedy}")

    def evaluation(self, means: dict[str, float], values: PairValues, inputs: Inputs) -> None:
        """Write the files of the evaluation after the last step."""
        with warn_on_bug("the last evaluation's folder", self.run.warn):
            dataset = inputs.eval_set
            assert dataset is not None, "evaluations have data"
            config = self.run.config
            folder = self.run.folder
            write_evaluation(
                LAST_EVALUATION,
                str(folder.model),
                means,
                values,
                dataset,
                run=folder,
                loss=config.loss,
                reference=config.reference.path or config.model.path,
                seed=config.trainer.seed,
            )
            if not config.loss.is_one_sided:
                file = folder.named_evaluation(LAST_EVALUATION).worst
                write_worst(file, values, dataset, inputs.tokenizer, is_unpaired=config.loss.is_unpaired)

    def close(self, summary: Mapping[str, Any], outcome: RunOutcome) -> None:
        """Write summary, verdict, curves and page, end tracking, and print the closing table and verdict."""
        run = self.run
        rows = self.metrics.rows
        folder = run.folder
        final_summary = {**summary, "exit": outcome.value}
        lines: list[str] = []
        with warn_on_bug("the verdict", run.warn):
            run_verdict = verdict(rows, final_summary, data_findings(folder))
            final_summary["verdict"] = run_verdict.as_dict()
            lines = run_verdict.lines()
        self.metrics.close(final_summary)
        with warn_on_bug(folder.curves.name, run.warn):
            draw_curves(rows, folder.curves, folder.path.name)
        with warn_on_bug(folder.report.name, run.warn):
            write_page(folder, rows=rows)
        with warn_on_bug("the closing table", run.warn):
            lines = [*closing_table(folder, rows, final_summary), *lines]
        self.end(final_summary, lines)


def write_worst(
    file: Path,
    values: PairValues,
    dataset: PreferenceDataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    is_unpaired: bool = False,
) -> None:
    """Write the pairs with the lowest negative margins and their texts, whole or not at all.

    For labelled records: good ones with the lowest, and bad ones with the highest rewards.
    """
    lines = []
    order = np.argsort(values.margin, kind="stable")
    worst = order[:_WORST]
    sides = [values.tokens_chosen[order] > 0, values.tokens_rejected[order] > 0]
    if is_unpaired:
        worst = np.concatenate([order[side][: _WORST // 2] for side in sides])
    for index in worst.tolist():
        if values.margin[index] < 0:
            example = dataset.example(index)
            origin = without_secrets(str(dataset.origin(index)))
            row: dict[str, Any] = {"origin": origin, "margin": float(values.margin[index])}
            texts = {"chosen": example.responses[0], "rejected": example.responses[-1]}
            if is_unpaired:
                side = "chosen" if values.tokens_chosen[index] > 0 else "rejected"
                texts = {side: example.responses[0]}
            prompt, images = shown_prompt(example, dataset.images)
            for name, ids in {"prompt": prompt, **texts}.items():
                row[name] = str(tokenizer.decode(ids.tolist(), skip_special_tokens=False))
            if images:
                row["images"] = images
            lines.append(json.dumps(row) + "\n")
    files.write_text(file, "".join(lines))


def open_recorder(run: Run, metrics: MetricsLog, on_row: OnRow | None = None) -> RunRecorder:
    """Return the recorder of a training run, with its trackers."""
    return RunRecorder(run, metrics, opened_trackers(run, metrics, sent_samples(run.config)), on_row)


def sent_samples(config: RunConfig) -> int:
    """Return how many rows of samples trackers get: none unless the user asked for samples."""
    return config.tracking.samples if config.section_of(SamplesConfig).prompts else 0


def reporting(on_row: OnRow | None = None, on_moment: OnMoment | None = None) -> Reporting:
    """Return everything that reports on a run; `on_row` is called with each of its metrics rows."""
    open_one = partial(open_recorder, on_row=on_row)
    return Reporting(open_one, run_card, prepare_samples, write_page, on_moment)
