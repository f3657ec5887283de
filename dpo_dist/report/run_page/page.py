"""`report.html`: one self-contained page with a run's configuration, results and cost.

It is made from the files of the run directory only; missing files are skipped. It has no script, loads
nothing from other addresses, and escapes every text.
"""

import base64
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, TypeVar

import yaml

from dpo_dist import atomic
from dpo_dist.config.run_folder import RunFolder
from dpo_dist.report.html_page import html_page
from dpo_dist.report.metrics_log import PHASES, metrics_by_source, read_rows

Fields = Mapping[str, Any]
Content = TypeVar("Content")

_HIGHLIGHTS = (
    "model.path",
    "model.revision",
    "model.dtype",
    "model.adapter",
    "model.quantization",
    "data.train",
    "data.eval",
    "data.max_length",
    "loss.kind",
    "loss.beta",
    "loss.terms",
    "reference.mode",
    "reference.path",
    "optim.lr",
    "optim.schedule",
    "trainer.global_batch_pairs",
    "trainer.epochs",
    "trainer.max_steps",
    "trainer.seed",
    "parallelism.kind",
)
_EVALUATION_COLUMNS = {
    "step": "step",
    "eval_loss": "loss",
    "eval_rewards/accuracies": "accuracy",
    "eval_rewards/margins": "margin",
    "eval_rewards/chosen": "reward chosen",
    "eval_rewards/rejected": "reward rejected",
    "eval_logps/chosen": "log-prob chosen",
    "eval_logps/rejected": "log-prob rejected",
}
_MOST_EVALUATIONS = 20
_SOURCE_COLUMNS = {
    "rewards/accuracies": "accuracy",
    "rewards/margins": "margin",
    "eval_rewards/accuracies": "eval accuracy",
    "eval_rewards/margins": "eval margin",
}

_log = logging.getLogger(__name__)


def write_page(folder: RunFolder, price_per_gpu_hour: float | None = None) -> None:
    """Write the report page of a run directory.

    Sections whose file is missing are omitted; sections whose file cannot be read too, with a warning.

    Args:
        folder: the run directory.
        price_per_gpu_hour: in place of `tracking.price_per_gpu_hour` of the run.
    """
    name = folder.path.resolve().name
    config = _read(folder.config, _yaml_fields) or {}
    environment = _read(folder.environment, _json_fields) or {}
    summary = _read(folder.summary, _json_fields) or {}
    rows = _read(folder.log_history, read_rows) or []
    curves = _read(folder.curves, Path.read_bytes)
    sections = (
        _header(name, summary.get("exit")),
        _headline(summary, price_per_gpu_hour or (config.get("tracking") or {}).get("price_per_gpu_hour")),
        _picture(curves) if curves else "",
        _section("Configuration", _pairs_table(_highlights(config))),
        _section("Evaluations", _evaluations(rows)),
        _section("Sources", _sources(rows)),
        _section("Time of a step by phase", _phases(rows)),
        _section("Reference log-probs", _pairs_table(_flat(summary.get("reference") or {}))),
        _section("Data", _pairs_table(_flat(summary.get("data") or {}))),
        _section("Environment", _pairs_table(_flat(environment))),
        _folded("Complete configuration", _pairs_table(_flat(config))),
    )
    atomic.write_text(folder.report, html_page(name, sections))


def _read(path: Path, parse: Callable[[Path], Content]) -> Content | None:
    try:
        return parse(path)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, yaml.YAMLError) as error:
        _log.warning("%s cannot be read and is omitted from the report: %s", path, error)
        return None


def _yaml_fields(path: Path) -> Fields:
    return dict(yaml.safe_load(path.read_bytes()))


def _json_fields(path: Path) -> Fields:
    return dict(json.loads(path.read_bytes()))


def _header(name: str, outcome: object) -> str:
    badge = f'<span class="badge {escape(str(outcome))}">{escape(str(outcome))}</span>' if outcome else ""
    return f"<header><h1>{escape(name)}</h1>{badge}</header>"


def _headline(summary: Fields, price: float | None) -> str:
    """Return tiles with the main results; a value without a measurement has no tile."""
    final, best = summary.get("final") or {}, summary.get("best") or {}
    pairs = summary.get("pairs_seen")
    tiles = (
        ("final loss", final.get("loss"), _short, ""),
        ("eval loss", final.get("eval_loss"), _short, _best(best.get("eval_loss"))),
        (
            "eval accuracy",
            final.get("eval_rewards/accuracies"),
            _short,
            _best(best.get("eval_rewards/accuracies")),
        ),
        ("eval margin", final.get("eval_rewards/margins"), _short, ""),
        ("steps", summary.get("steps"), _short, "" if pairs is None else f"{_short(pairs)} pairs"),
        ("training time", summary.get("train_seconds"), _duration, ""),
        ("cost", _gpu_hours(summary, price), _short, "of training"),
        ("pairs per second", summary.get("pairs_per_second"), _short, ""),
        ("peak memory", summary.get("peak_memory_bytes"), _gibibytes, "of the process with the most"),
        ("processes", summary.get("world_size"), _short, ""),
    )
    shown = [
        f"<div><span>{label}</span><b>{escape(form(value))}</b><small>{escape(note)}</small></div>"
        for label, value, form, note in tiles
        if value is not None
    ]
    return f'<div class="tiles">{"".join(shown)}</div>' if shown else ""


def _gpu_hours(summary: Fields, price: float | None) -> float | None:
    if price is None or not summary.get("train_seconds"):
        return None
    return float(price * summary["train_seconds"] * (summary.get("world_size") or 1) / 3600)


def _picture(png: bytes) -> str:
    return f'<img alt="Training curves" src="data:image/png;base64,{base64.b64encode(png).decode("ascii")}">'


def _highlights(config: Fields) -> Iterator[tuple[str, str]]:
    for key in _HIGHLIGHTS:
        group, _, name = key.partition(".")
        value = (config.get(group) or {}).get(name)
        if value not in (None, [], {}):
            yield key, _text(value)


def _evaluations(rows: Sequence[Mapping[str, float]]) -> str:
    evaluations = [row for row in rows if "eval_loss" in row]
    shown = evaluations[-_MOST_EVALUATIONS:]
    note = f"<p>The last {len(shown)} of {len(evaluations)}.</p>" if len(shown) < len(evaluations) else ""
    return _numbers(_EVALUATION_COLUMNS, shown) + note


def _sources(rows: Sequence[Mapping[str, float]]) -> str:
    """Return a table of the last metrics of each source; empty for a run with one source."""
    sources = sorted(metrics_by_source(rows).items())
    return _numbers(_SOURCE_COLUMNS, [last for _, last in sources], [label for label, _ in sources])


def _numbers(columns: Fields, rows: Sequence[Mapping[str, float]], sources: Sequence[str] = ()) -> str:
    """Return a table of those `columns`, titles by key, that a row has; `sources` is a column before them."""
    keys = [key for key in columns if any(key in row for row in rows)]
    lines = [[_short(row[key]) if key in row else "" for key in keys] for row in rows]
    head = "".join(f"<th>{columns[key]}</th>" for key in keys)
    if sources:
        head = f"<th>source</th>{head}"
        lines = [[escape(source), *line] for source, line in zip(sources, lines, strict=True)]
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in line) + "</tr>" for line in lines)
    return f'<table class="numbers"><tr>{head}</tr>{body}</table>' if rows else ""


def _phases(rows: Sequence[Mapping[str, float]]) -> str:
    """Return a table of each phase's mean seconds over the logged steps, and its share of a step."""
    timed = [row for row in rows if all(f"time/{phase}" in row for phase in PHASES)]
    if not timed:
        return ""
    seconds = {phase: sum(row[f"time/{phase}"] for row in timed) / len(timed) for phase in PHASES}
    step = sum(seconds.values())
    lines = [
        f"<tr><th>{phase}</th><td>{1000 * spent:,.1f} ms</td><td>{spent / step:.1%}</td>"
        f'<td><meter value="{spent / step:.4f}"></meter></td></tr>'
        for phase, spent in seconds.items()
    ]
    note = f"<p>Mean of the {len(timed)} logged steps, on the first process.</p>"
    return f'<table class="phases">{"".join(lines)}</table>{note}'


def _flat(fields: Fields, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield nested fields as dotted keys with the text of their values."""
    for key, value in fields.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", _text(value)


def _pairs_table(pairs: Iterable[tuple[str, str]]) -> str:
    lines = [f"<tr><th>{escape(key)}</th><td>{escape(value)}</td></tr>" for key, value in pairs]
    return f"<table>{''.join(lines)}</table>" if lines else ""


def _section(title: str, content: str) -> str:
    return f"<section><h2>{title}</h2>{content}</section>" if content else ""


def _folded(title: str, content: str) -> str:
    return f"<details><summary>{title}</summary>{content}</details>" if content else ""


def _text(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_text(item)}" for key, item in value.items() if item is not None)
    if isinstance(value, list | tuple):
        return "; ".join(map(_text, value)) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    return "none" if value is None else str(value)


def _best(best: Fields | None) -> str:
    return f"best {_short(best['value'])} at step {_short(best['step'])}" if best else ""


def _short(value: float) -> str:
    return f"{value:,.0f}" if isinstance(value, int) or abs(value) >= 1000 else f"{value:#.4g}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def _gibibytes(count: float) -> str:
    return f"{count / 2**30:.1f} GiB"
