"""Style sheet of the page, added to that of `html_page`."""

import re
from collections.abc import Callable, Mapping
from html import escape
from pathlib import Path
from typing import Any

from dpo_dist.config.run_folder import RunFolder
from dpo_dist.foundation import files
from dpo_dist.foundation.errors import RunOutcome
from dpo_dist.foundation.text import counted, duration, money, number, percent, size
from dpo_dist.insight.doctor.findings import Level
from dpo_dist.insight.pages.charts import charts
from dpo_dist.insight.pages.facts import Fields, PageFacts, cost, read_facts
from dpo_dist.insight.pages.render import html_page, inert_html, made, note, section
from dpo_dist.insight.pages.samples import SAMPLES_STYLE, samples_section
from dpo_dist.insight.pages.sections import (
    accuracy_section,
    data_section,
    displacement_section,
    files_section,
    reference_section,
    repeat_section,
    settings_sections,
    speed_section,
)
from dpo_dist.insight.pages.svg import SCRIPT, STYLE
from dpo_dist.insight.verdict.facts import last
from dpo_dist.insight.verdict.rules import RULES, verdict

PAGE_STYLE = """
:root { --error: #b3264a; --warning: #a85b06; --good: #1a7f5a; --note: #4b6a9b; --fill: #0072b2; }
@media (prefers-color-scheme: dark) { :root { --fill: #5eb5f0; --note: #8fb0e0; } }
nav { display: flex; flex-wrap: wrap; gap: 2px 16px; font-size: 14px; margin: 12px 0; }
p { max-width: 82ch; overflow-wrap: anywhere; }
.verdict { border: 1px solid var(--line); border-left: 6px solid var(--note); border-radius: 8px; }
.verdict { padding: 4px 20px 12px; margin: 20px 0; }
.verdict h2 { margin: 12px 0 0; font-size: 14px; color: var(--quiet); font-weight: 500; }
.verdict.good { border-left-color: var(--good); }
.verdict.warning { border-left-color: #d98a1f; }
.verdict.error { border-left-color: var(--error); }
.sentence { font-size: 19px; line-height: 1.4; font-weight: 600; margin: 4px 0 8px; max-width: 72ch; }
.verdict ol { margin: 8px 0 0; padding-left: 22px; }
.verdict li { margin: 10px 0; max-width: 86ch; overflow-wrap: anywhere; }
.finding ul { margin: 4px 0; padding-left: 18px; }
.finding li { overflow-wrap: anywhere; }
.advice { color: var(--quiet); }
.advice b { color: CanvasText; }
.tiles div { min-width: 0; overflow-wrap: anywhere; }
.wide table { width: auto; min-width: 50%; }
.wide td { overflow-wrap: normal; }
.wide td small { color: var(--quiet); }
.numbers td:first-child, .numbers th:first-child { text-align: left; overflow-wrap: anywhere; }
.numbers td:first-child { max-width: 260px; }
.numbers td:first-child small { display: block; font-size: 12px; }
.counts td:first-child, .counts th:first-child { text-align: right; }
.counts td small { display: block; font-size: 12px; }
.numbers td, .phases td, .counts td:first-child { white-space: nowrap; }
.numbers td:first-child { white-space: normal; min-width: 90px; }
.phases td:first-child { text-align: left; white-space: normal; }
.phases td small { display: block; font-size: 12px; }
.phases meter { width: 160px; }
.interval { overflow: visible; width: 110px; height: 13px; vertical-align: middle; margin-left: 8px; }
.interval .track { stroke: var(--line); stroke-width: 2; }
.interval .half { stroke: var(--quiet); stroke-width: 1; stroke-dasharray: 2 2; }
.interval path.fill { stroke: var(--fill); stroke-width: 4; }
.interval circle.fill { fill: var(--fill); }
article { border: 1px solid var(--line); border-radius: 8px; padding: 8px 14px; margin: 10px 0; }
article p { margin: 6px 0; }
article .badge { font-size: 13px; padding: 1px 10px; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: var(--tile); border-radius: 8px; }
pre { padding: 12px 14px; font-size: 13px; }
section details, details details { margin-top: 10px; }
details summary { font-size: 14px; }
@media (max-width: 600px) {
  main { padding: 14px; }
  .facts th { width: 38%; }
  .facts th, .facts td { padding-right: 8px; }
  .tiles { grid-template-columns: repeat(auto-fill, minmax(140px, 1fr)); }
  .tiles b { font-size: 20px; }
  .sentence { font-size: 17px; }
  .verdict { padding: 4px 14px 12px; }
  .phases meter { display: none; }
}
@media print { details:not([open]) { display: none; } nav { display: none; } }
"""


_ADVICE = ". Try: "
_NAME = re.compile("`([^`]+)`")
_NO_FAULT = (
    "No rule of the verdict found a fault. That is no proof of a good model: read the responses, and "
    "evaluate it on other data."
)


def header(facts: PageFacts) -> str:
    """Return the name of the run, its outcome, and one sentence about what was run."""
    name, outcome = facts.folder.path.resolve().name, facts.summary.get("exit")
    badge = f'<span class="badge {escape(str(outcome))}">{escape(str(outcome))}</span>' if outcome else ""
    about = inert_html(_about(facts))
    return f"<header><h1>{inert_html(name)}</h1>{badge}</header>" + (f"<p>{about}</p>" if about else "")


def verdict_section(facts: PageFacts) -> str:
    """Return the verdict with its findings; for a run that has not ended, this fact."""
    judged = _verdict(facts)
    if not judged:
        return _unfinished(facts)
    findings = judged.get("findings") or []
    is_diverged = facts.summary.get("exit") == RunOutcome.diverged
    faults = [
        one
        for one in findings
        if not ((rule := RULES.get(str(one.get("rule")))) and rule.level is Level.note)
    ]
    level = "error" if is_diverged else "warning" if faults else "good"
    sentence = str(judged["sentence"])
    items = "".join(f"<li>{_finding(finding, sentence)}</li>" for finding in findings)
    below = ("" if faults else note(_NO_FAULT)) + (f"<ol>{items}</ol>" if items else "")
    return (
        f'<section id="verdict" class="verdict {level}"><h2>Verdict</h2>'
        f'<p class="sentence">{inert_html(_capital(sentence))}.</p>{below}</section>'
    )


def _verdict(facts: PageFacts) -> Fields:
    """Return the verdict of the summary; of an earlier version's run it is made here."""
    recorded = facts.summary.get("verdict")
    if recorded or not (facts.run.rows and facts.summary.get("exit")):
        return recorded or {}
    return verdict(facts.run.rows, facts.summary, facts.run.data_findings).as_dict()


def _unfinished(facts: PageFacts) -> str:
    if facts.summary.get("exit") or not facts.run.rows:
        return ""
    step = facts.run.rows[-1]["step"]
    sentence = f"This run has not ended: its last metrics are of step {step:,.0f}."
    return f'<section id="verdict" class="verdict warning"><p class="sentence">{sentence}</p></section>'


def _finding(finding: Fields, sentence: str) -> str:
    """Return a finding, without its facts if the verdict's sentence has them."""
    rule = RULES.get(str(finding.get("rule")))
    headline = _capital(rule.text if rule else str(finding.get("rule")).replace("_", " "))
    fact, _, advice = str(finding.get("text")).partition(_ADVICE)
    tip = f'<div class="advice"><b>Try</b> {_with_code(advice)}.</div>' if advice else ""
    facts = "" if fact in sentence else f"<div>{_with_code(_capital(fact))}.</div>"
    return f"<b>{inert_html(headline)}</b>{facts}{tip}"


def _with_code(sentence: str) -> str:
    """Return plain text as HTML, with names of keys in the font of code."""
    return _NAME.sub(r"<code>\1</code>", inert_html(sentence))


def _capital(sentence: str) -> str:
    return sentence[:1].upper() + sentence[1:]


def _about(facts: PageFacts) -> str:
    """Return model, method, data and size of the run in one sentence; empty without a configuration."""
    if facts.setting("model.path") is None:
        return ""
    adapter = facts.setting("model.adapter")
    weights = _trained_weights(adapter)
    terms = facts.setting("loss.terms")
    loss = " + ".join(str(term.get("kind")) for term in terms) if terms else str(facts.setting("loss.kind"))
    settings = facts.section("settings")
    beta = f" with beta {number(settings['loss.beta'], 3)}" if settings.get("loss.beta") is not None else ""
    parts = [
        f"{facts.setting('model.path')} ({weights}, {facts.setting('model.dtype')})",
        f"loss {loss}{beta}",
        f"learning rate {number(facts.setting('optim.lr') or 0, 3)}",
        *_sizes(facts),
        counted(facts.devices, "GPU" if facts.has_gpus else "process", "" if facts.has_gpus else "processes"),
    ]
    return "; ".join(parts) + "."


def _trained_weights(adapter: Mapping[str, Any] | None) -> str:
    if not adapter:
        return "all weights"
    if adapter.get("path") is not None and not adapter.get("on_top"):
        return f"continued LoRA adapter {adapter['path']}"
    return f"LoRA adapter of rank {adapter['r']}"


def _sizes(facts: PageFacts) -> list[str]:
    counts = {name: facts.run.counts(name).get("pairs") for name in ("train", "eval")}
    names = {"train": "training pair", "eval": "evaluation pair"}
    sizes = [counted(count, names[name]) for name, count in counts.items() if count]
    steps = facts.summary.get("steps")
    batch = facts.setting("trainer.global_batch_pairs")
    return sizes + ([f"{counted(steps, 'step')} of {counted(batch, 'pair')}"] if steps and batch else [])


def tiles(facts: PageFacts) -> str:
    """Return tiles with the main results; a value without a measurement has no tile."""
    summary, final, best = facts.summary, facts.section("final"), facts.section("best")
    pairs = summary.get("pairs_seen")
    finished = last(facts.run.evaluations, "samples/finished")
    shown = (
        ("final loss", final.get("loss"), number, "training, mean of the last logged steps"),
        ("eval loss", final.get("eval_loss"), number, _best(best.get("eval_loss"))),
        (
            "eval accuracy",
            final.get("eval_rewards/accuracies"),
            number,
            _joined(_interval(facts, "rewards/accuracies"), _best(best.get("eval_rewards/accuracies"))),
        ),
        (
            "eval margin",
            final.get("eval_rewards/margins"),
            number,
            _interval(facts, "rewards/margins") or "reward of chosen minus rejected",
        ),
        ("best checkpoint", *_best_checkpoint(facts)),
        ("sampled responses that end", finished, percent, "by themselves, at the last evaluation"),
        ("steps", summary.get("steps"), number, "" if pairs is None else f"{number(pairs)} pairs"),
        ("training time", summary.get("train_seconds"), duration, "of optimizer steps"),
        ("pairs per second", summary.get("pairs_per_second"), number, ""),
        ("peak memory", summary.get("peak_memory_bytes"), size, "of the process with the most"),
        ("processes", summary.get("world_size"), number, _hardware(facts)),
        ("cost", cost(facts), money, "see time, memory and cost"),
    )
    found = [_tile(*tile) for tile in shown if tile[1] is not None]
    return f'<div class="tiles">{"".join(found)}</div>' if found else ""


def _best_checkpoint(facts: PageFacts) -> tuple[int | None, Callable[[Any], str], str]:
    """Return step, form and text of the best checkpoint by `trainer.keep_best`."""
    for one in facts.summary.get("best_checkpoints", []):
        return int(one["step"]), number, f"step; {one['metric']} {number(one['value'])}"
    return None, number, ""


def _tile(label: str, value: Any, form: Callable[[Any], str], below: str) -> str:
    small = f"<small>{inert_html(below)}</small>" if below else ""
    return f"<div><span>{label}</span><b>{escape(form(value))}</b>{small}</div>"


def _hardware(facts: PageFacts) -> str:
    gpus = [str(name) for name in facts.environment.get("gpus") or []]
    return ", ".join(dict.fromkeys(gpus)) if gpus else "without GPU" if facts.environment else ""


def _interval(facts: PageFacts, metric: str) -> str:
    ends = ((facts.evaluation.get("all") or {}).get("intervals") or {}).get(f"eval_{metric}")
    return f"95 %: {number(ends[0])} to {number(ends[1])}" if ends else ""


def _best(best: Fields | None) -> str:
    return f"best {number(best['value'])} at step {number(int(best['step']))}" if best else ""


def _joined(*texts: str) -> str:
    return "; ".join(filter(None, texts))


Maker = Callable[[PageFacts], str]

_HEADING = re.compile(r'<section id="(\w+)"[^>]*><h2>([^<]*)</h2>')
_CURVES = (
    "Light lines: means of the steps between two metrics rows; bold lines: their moving mean; rings: "
    "evaluations. Hours are those of optimizer steps."
)


def write_page(
    folder: RunFolder, price_per_gpu_hour: float | None = None, output: Path | None = None
) -> Path:
    """Write the report page of a run directory, and return its path.

    Sections whose file is missing are omitted; those whose file cannot be read, or has other content than
    this program writes, too, with a warning.

    Args:
        folder: the run directory.
        price_per_gpu_hour: in place of `tracking.price_per_gpu_hour` of the run.
        output: the page, in place of `report.html` in the run directory.
    """
    facts = read_facts(folder, price_per_gpu_hour)
    main: tuple[Maker, ...] = (header, verdict_section, tiles)
    details: tuple[Maker, ...] = (
        _samples,
        _curves,
        accuracy_section,
        displacement_section,
        data_section,
        speed_section,
        reference_section,
        repeat_section,
        files_section,
        settings_sections,
    )
    first, later = ([made(make, facts, "report") for make in makers] for makers in (main, details))
    style, script = PAGE_STYLE + SAMPLES_STYLE + STYLE, SCRIPT if facts.run.rows else ""
    page = html_page(folder.path.resolve().name, [*first, _contents(later), *later], style, script)
    path = output or folder.report
    files.write_text(path, page)
    return path


def _contents(sections: list[str]) -> str:
    """Return links to the sections."""
    found = [link for part in sections for link in _HEADING.findall(part)]
    links = "".join(f'<a href="#{name}">{title}</a>' for name, title in found)
    return f"<nav>{links}</nav>" if len(found) > 1 else ""


def _samples(facts: PageFacts) -> str:
    return samples_section(facts.folder, facts.run.rows)


def _curves(facts: PageFacts) -> str:
    shown = charts(facts.run.rows)
    return section("curves", "Curves", note(_CURVES), shown) if shown else ""
