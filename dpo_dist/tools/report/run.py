"""Write the page about a run, from the verdict to the command that repeats it."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dpo_dist.data import describe_counts
from dpo_dist.foundation import files
from dpo_dist.foundation.errors import RunOutcome
from dpo_dist.foundation.text import number, without_secrets
from dpo_dist.foundation.types import Fields
from dpo_dist.kit import (
    MetricsRow,
    RunFolder,
    RunHistory,
    evaluation_cells,
    final_and_best,
)
from dpo_dist.tools.doctor.folder import DoctorFolder
from dpo_dist.tools.findings import Level, finding_block
from dpo_dist.tools.pages.blocks import (
    Chart,
    Folded,
    Heading,
    PageBlock,
    Table,
    Text,
    titled_section,
)
from dpo_dist.tools.pages.charts import charts_of_run
from dpo_dist.tools.pages.render import flat, page
from dpo_dist.tools.pages.samples import CAUTION, samples_section, worst_pairs
from dpo_dist.tools.report.facts import MARGIN, RunFacts, data_findings, last
from dpo_dist.tools.report.verdict import RUN_RULES
from dpo_dist.tools.tables import closing_facts, result_table

_NO_PROOF = (
    "No rule of the verdict found a fault. That does not prove that the model is good: read its responses, "
    "and evaluate it on other data."
)
_CURVES = (
    "Light lines, where there are any: means of the steps between two metrics rows; bold lines: their moving "
    "mean; rings: evaluations."
)
_OF_PAIRS = (
    "Accuracy: share of pairs whose chosen response has the larger reward; guessing gives 0.5. Margin: "
    "reward of the chosen response minus that of the rejected one."
)
_OF_RECORDS = (
    "AUC: how often a good response has a larger reward than a bad one; guessing gives 0.5. Margin: mean "
    "reward of good responses minus that of bad ones."
)
_REWARD = (
    "A reward is beta times the log-ratio of policy and reference. Brackets: 95 % intervals, by bootstrap "
    "over prompts."
)
_NOT_EXAMINED = (
    "The doctor has not examined these data. Run dpo-dist doctor with the configuration of this run: it "
    "finds copies, leaks, labels that the length gives away, and more."
)
_REPEAT = (
    "Started in the same folder, this command gives the same run if commit, versions (both below) and data "
    "are the same. Give it an empty run.dir: with the existing one it resumes or completes that run."
)


class PageFacts:
    """The content of a run directory's files, without secrets; empty where a file is missing.

    `evaluation` has the results of the last evaluation of training, with intervals. `rows`: those of its
    file, if they have been read.
    """

    def __init__(self, folder: RunFolder, rows: Sequence[MetricsRow] | None = None):
        history = RunHistory(folder)
        self.config: Fields = without_secrets(history.written_config())
        self.environment = _fields(folder.environment)
        self.state = _fields(folder.state)
        summary = _fields(folder.summary)
        rows = history.rows() if rows is None else rows
        self.summary = {**final_and_best(rows), **summary}
        self.run = RunFacts(rows, self.summary, data_findings(folder))
        evaluation = _fields(folder.last_evaluation.results)
        # If a resumed run stopped early, the file has an earlier evaluation than the rows, and is not used.
        last = self.run.evaluations[-1] if self.run.evaluations else {}
        loss = (evaluation.get("all") or {}).get("eval_loss")
        is_last = loss is not None and math.isclose(loss, last.get("loss", math.nan), rel_tol=1e-6)
        self.evaluation: Fields = evaluation if is_last else {}

    def setting(self, key: str) -> Any:
        """Return the value of a key of the configuration; None if it is not known."""
        section, name = key.split(".")
        return (self.config.get(section) or {}).get(name)

    def section(self, name: str) -> Fields:
        """Return a section of summary.json; empty if it is missing."""
        return self.summary.get(name) or {}


def _fields(path: Path) -> Fields:
    """Return a file's fields without secrets, because pages are shared; empty if there is no file."""
    fields: Fields = without_secrets(files.read_fields(path)) if path.exists() else {}
    return fields


def write_page(
    folder: RunFolder, output: Path | None = None, rows: Sequence[MetricsRow] | None = None
) -> Path:
    """Write the report page of a run directory, or `output`; return its path. `rows`: as in `PageFacts`."""
    facts = PageFacts(folder, rows)
    run = facts.run
    outcome = facts.summary.get("exit")
    level = _level(facts)
    is_running = "exit" not in facts.summary
    command = facts.environment.get("command")
    blocks: list[PageBlock] = [
        *_verdict(facts, level),
        *_results(facts, folder),
        *samples_section(folder),
        *_curves(charts_of_run(run.rows)),
        *_accuracy(facts, folder),
        *titled_section("Data", _data(facts, folder)),
        *titled_section("Repeat this run", [Text(command, "code"), Text(_REPEAT, "note")] if command else []),
    ]
    for title, fields in (("Configuration", facts.config), ("Environment", facts.environment)):
        if fields:
            blocks.append(Folded(title, [Table([], list(flat(fields)), "facts")]))
    about = "; ".join(_about(facts))
    if about:
        blocks.insert(0, Text(about))
    badges = []
    if outcome:
        badges.append((level if level and outcome == RunOutcome.completed else outcome, outcome))
    path = output or folder.report
    html = page(folder.path.resolve().name, blocks, badges, reloads=is_running)
    files.write_text(path, html)
    return path


def _level(facts: PageFacts) -> str:
    """Return the level of the verdict: good, warning or error; "" before the run has ended."""
    stored: Fields = facts.summary.get("verdict") or {}
    if not stored:
        return ""
    if facts.summary.get("exit") == RunOutcome.diverged:
        return str(Level.error)
    return str(Level.warning) if stored["findings"] else "good"


def _verdict(facts: PageFacts, level: str) -> Iterator[PageBlock]:
    """Yield the verdict with its findings, or how far a run in training has come."""
    stored: Fields = facts.summary.get("verdict") or {}
    last_step = last(facts.run.rows, "step")
    if not stored:
        if "exit" not in facts.summary and last_step is not None:
            sentence = f"This run has not ended: its last metrics are of step {number(last_step)}."
            yield Text("", "warning", sentence)
        return
    sentence = stored["sentence"]
    lines = []
    if level == "good":
        lines.append(_NO_PROOF)
    for finding in stored["findings"]:
        rule = RUN_RULES.get(finding["rule"])
        if finding["text"] not in sentence:  # which states the worst finding
            lines.append(f"{_capital(rule.text if rule else finding['rule'])}: {finding['text']}.")
        lines.append(f"Try {finding['remedy']}.\n")
    yield Heading("Verdict")
    yield Text("\n".join(lines).strip(), level, f"{_capital(sentence)}.")


def _capital(sentence: str) -> str:
    return sentence[:1].upper() + sentence[1:]


def _curves(charts: Sequence[Chart]) -> list[PageBlock]:
    return titled_section("Curves", [Text(_CURVES, "note"), *charts] if charts else [])


def _accuracy(facts: PageFacts, folder: RunFolder) -> list[PageBlock]:
    """Return the section on accuracy and margin, by source, with the worst pairs."""
    table = _by_source(facts)
    if table is None:
        return []
    unit = facts.run.unit
    note = _OF_PAIRS if unit == "pair" else _OF_RECORDS
    blocks: list[PageBlock] = [table, Text(f"{note} {_REWARD}", "note")]
    worst = worst_pairs(folder.last_evaluation.worst) if facts.evaluation else []
    if worst:
        title = "Evaluation pairs with the lowest margins"
        if unit == "record":
            title = "Good responses with the lowest rewards, and bad ones with the highest"
        caution = f"{CAUTION} Some of these {unit}s may be labelled wrongly."
        blocks.append(Folded(title, [Text(caution, "note"), *worst]))
    return titled_section(f"{_capital(facts.run.accuracy_title)} and margin", blocks)


def _data(facts: PageFacts, folder: RunFolder) -> Iterator[PageBlock]:
    """Yield the counts of the data, and the doctor's findings about them."""
    counted = {name: counts for name, counts in facts.section("data").items() if counts}
    for name, counts in counted.items():
        yield Text("\n".join(describe_counts(name, counts)), "code")
    if not counted:
        return
    notes = list[PageBlock]()
    findings = list[PageBlock]()
    for found in facts.run.data_findings:
        (notes if found["level"] == Level.note else findings).append(finding_block(found))
    if findings or notes:
        yield Text("", title="Findings of the doctor")
        yield from findings or [Text("No errors and no warnings.")]
    if notes:
        yield Folded(f"Notes ({len(notes)})", notes)
    if not DoctorFolder(folder.path).doctor_report.is_file():
        yield Text(_NOT_EXAMINED, "note")


def _about(facts: PageFacts) -> Iterator[str]:
    """Yield phrases on the run's model and loss; nothing without a configuration."""
    if not facts.config:
        return
    weights = "LoRA adapter" if facts.setting("model.adapter") else "all weights"
    yield f"{facts.setting('model.path')} ({weights}, {facts.setting('model.dtype')})"
    terms = facts.setting("loss.terms")
    loss = " + ".join(term["kind"] for term in terms) if terms else facts.setting("loss.kind")
    beta = facts.section("settings").get("loss.beta")
    with_beta = "" if beta is None else f" with beta {number(beta, 3)}"
    yield f"loss {loss}{with_beta}"
    yield f"learning rate {number(facts.setting('optim.lr') or 0, 3)}."


def _results(facts: PageFacts, folder: RunFolder) -> Iterator[PageBlock]:
    """Yield what a run prints at its end."""
    yield result_table(facts.run.rows, facts.summary)
    if facts.summary.get("exit") and "steps" in facts.summary:
        yield Table([], list(closing_facts(folder, facts.run.rows, facts.summary).items()), "facts")


def _by_source(facts: PageFacts) -> Table | None:
    """Return the table of accuracy and margin of the last evaluation: all pairs, then each source."""
    if not facts.evaluation:
        return None
    titles, *rows = evaluation_cells(facts.evaluation, (facts.run.accuracy_key, MARGIN))
    return Table(titles, rows)
