"""Head of the page: name, outcome, the verdict and its findings, the main numbers."""

import re
from collections.abc import Callable, Mapping
from html import escape
from typing import Any

from dpo_dist.diagnostics.run_facts import last
from dpo_dist.diagnostics.run_rules import RULES
from dpo_dist.diagnostics.verdict import verdict
from dpo_dist.errors import RunOutcome
from dpo_dist.number_text import counted, duration, money, number, percent, size
from dpo_dist.report.blocks import note
from dpo_dist.report.inert import inert_html
from dpo_dist.report.run_page.cost import cost
from dpo_dist.report.run_page.facts import Fields, PageFacts

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
    faults = [one for one in findings if not ((rule := RULES.get(str(one.get("rule")))) and rule.is_remark)]
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
    headline = _capital(rule.headline if rule else str(finding.get("rule")).replace("_", " "))
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
