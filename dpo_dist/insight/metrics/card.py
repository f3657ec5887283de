"""Parts of a Markdown document: any text in it stays text."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from dpo_dist.config.data import SourceConfig
from dpo_dist.config.identity import settings
from dpo_dist.config.losses import KINDS, LossKind
from dpo_dist.config.run_folder import RunFolder
from dpo_dist.config.schema import RunConfig
from dpo_dist.config.verb_options import ExportedWeights
from dpo_dist.foundation.streams import printable
from dpo_dist.foundation.text import counted, number, without_secrets
from dpo_dist.insight.evaluation import results_name
from dpo_dist.insight.pages.svg import evenly

_SPECIAL = re.compile(r"([\\`*_{}\[\]<()#+!|~$@&]|:(?=//)|(?<=[wW]{3})\.)")


def inert(text: str) -> str:
    """Return `text` on one line without markup, links or HTML."""
    return _SPECIAL.sub(r"\\\1", printable(" ".join(text.split())))


def code(text: str) -> str:
    """Return `text` on one line as a code span, also within a table."""
    line = printable(" ".join(text.split())).replace("|", "\\|")
    fence = "`" * (max(map(len, re.findall("`+", line)), default=0) + 1)
    space = " " if line.startswith("`") or line.endswith("`") else ""
    return f"{fence}{space}{line or ' '}{space}{fence}"


def table(rows: Sequence[Sequence[str]]) -> str:
    """Return a table of Markdown cells; the first row is its head."""
    head, *body = rows
    lines = [head, ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


Row = Mapping[str, Any]

_HUB_MODEL = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)
_HUB_DATASET = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
_SNAPSHOT = re.compile(r"models--(?:([\w.-]+?)--)?([\w.-]+)")
"""A folder of the hub's cache."""
_FILE = re.compile(r".*\.(jsonl?|csv|tsv|parquet|arrow|txt|gz|zst|zip)")
_PATHS = ("model.path", "data.train", "data.eval", "reference.path", "data.chat_template")
_METRICS = {
    "eval_rewards/accuracies": ("accuracy", "accuracy of the reward"),
    "eval_rewards/margins": ("margin", "reward margin"),
    "eval_loss": ("loss", "loss"),
}
_CURVES = {
    "eval_loss": "loss",
    "eval_rewards/accuracies": "accuracy",
    "eval_rewards/margins": "margin",
    "eval_logps/chosen_per_token": "log-prob chosen / token",
    "eval_logps/rejected_per_token": "log-prob rejected / token",
}
_MOST_EVALUATIONS = 20
_MOST_LABELS = 50
_REWARDS = (
    "A reward is beta times the log-ratio of model and reference; accuracy is the share of pairs whose "
    "chosen response has the larger reward; in brackets 95 % intervals by bootstrap over prompts."
)


def model_card(
    config: RunConfig,
    summary: Row,
    rows: Sequence[Row],
    evaluation: Mapping[str, Row] | None,
    versions: Mapping[str, str],
) -> str:
    """Return the content of the card.

    Args:
        config: of the run.
        summary: content of summary.json, with `verdict`.
        rows: of log_history.json.
        evaluation: content of evaluation.json, of the run's last evaluation; None without evaluation data.
        versions: by package.
    """
    sections = [
        f"# {inert(_title(config))}",
        _introduction(config, summary),
        f"## How to load it\n\n{_loading(config)}",
        f"## Evaluation\n\n{_evaluation(evaluation)}" if evaluation else "",
        f"## Curve\n\n{_curve(rows)}" if any("eval_loss" in row for row in rows) else "",
        f"## Data\n\n{_data(config, summary)}",
        f"## Training\n\n{_training(config)}",
        f"## Versions\n\n{_facts('package', 'version', versions)}",
        "## Licence\n\nThis card states none: see those of the base model and of the data.",
    ]
    metadata = _metadata(config, summary, evaluation).to_yaml()
    body = "\n\n".join(section for section in sections if section)
    return f"---\n{metadata}\n---\n\n{without_secrets(body)}\n"


def hub_name(path: str) -> str | None:
    """Return the hub name of a model, also of a folder in the hub's cache; None for another folder."""
    folder = Path(path).expanduser()
    if not folder.is_dir():
        return path if _HUB_MODEL.fullmatch(path) else None
    for part in folder.resolve().parts:
        if found := _SNAPSHOT.fullmatch(part):
            return f"{found[1]}/{found[2]}" if found[1] else found[2]
    return None


def _model_name(path: str) -> str:
    """Return the hub name of a model, or the name of its folder; of a run's model, the run directory's."""
    folder = Path(path).expanduser().resolve()
    run = RunFolder(folder.parent)
    return hub_name(path) or (run.path.name if folder == run.model and run.config.is_file() else folder.name)


def _hub_dataset(source: SourceConfig) -> str | None:
    is_local = Path(source.path).expanduser().exists() or _FILE.fullmatch(source.path)
    return source.path if not is_local and _HUB_DATASET.fullmatch(source.path) else None


def _title(config: RunConfig) -> str:
    base, losses = _model_name(config.model.path).rpartition("/")[2], "+".join(config.loss.kinds)
    return f"{base}-{losses}"


def _metadata(config: RunConfig, summary: Row, evaluation: Mapping[str, Row] | None) -> ModelCardData:
    base, is_adapter = hub_name(config.model.path), config.model.adapter is not None
    datasets = [name for source in config.data.train if (name := _hub_dataset(source)) is not None]
    results = list(_results(config, summary, evaluation or {}))
    metadata = ModelCardData(
        base_model=base,
        datasets=list(dict.fromkeys(datasets)) or None,
        eval_results=results or None,
        model_name=_title(config) if results else None,
        library_name="peft" if is_adapter else "transformers",
        pipeline_tag="text-generation",
        tags=["dpo-dist", "preference-optimization", *_tags(config)],
    )
    if base is not None:
        metadata["base_model_relation"] = "adapter" if is_adapter else "finetune"
    return metadata


def _tags(config: RunConfig) -> Iterator[str]:
    yield "dpo" if LossKind.sigmoid in config.loss.kinds else str(config.loss.kinds[0])
    if config.model.adapter is not None:
        yield "lora"


def _sources(config: RunConfig, summary: Row, part: str) -> list[tuple[Row, SourceConfig]]:
    """Return the counts of each source of `train` or `eval`, and the source."""
    sources = config.data.train if part == "train" else config.data.eval_sources
    return list(zip(summary["data"][part]["sources"], sources, strict=True))


def _results(config: RunConfig, summary: Row, evaluation: Mapping[str, Row]) -> Iterator[EvalResult]:
    """Yield the metrics of each label; of a label of several sources, the hub gets the first one's name."""
    first: dict[str, SourceConfig] = {}
    for counts, source in _sources(config, summary, "eval") if evaluation else ():
        first.setdefault(results_name(counts["label"]), source)
    for label, row in list(evaluation.items())[1 if len(evaluation) > 1 else 0 :]:
        dataset, name = _hub_dataset(first[label]), str(without_secrets(label))
        for key, (kind, title) in _METRICS.items():
            value = row.get(key)
            if value is None or not math.isfinite(value):
                continue
            yield EvalResult(
                task_type="text-generation",
                dataset_type=dataset or name,
                dataset_name=name,
                dataset_split=first[label].split if dataset else None,
                metric_type=kind,
                metric_name=title,
                metric_value=round(float(value), 4),
            )


def _introduction(config: RunConfig, summary: Row) -> str:
    base, quantized = _model_name(config.model.path), config.model.quantization
    papers = {kind: KINDS[kind].source for kind in config.loss.kinds if kind is not LossKind.custom}
    kinds = " + ".join(
        f"{code(kind)} ({papers[kind]})" if kind in papers else code(kind) for kind in config.loss.kinds
    )
    what = "A LoRA adapter of" if config.model.adapter is not None else "A fine-tuned"
    link = f"[{inert(base)}](https://huggingface.co/{base})" if hub_name(config.model.path) else code(base)
    bits = f" (trained on its {quantized} weights)" if quantized is not None else ""
    start = None if config.model.adapter is None else config.model.adapter.path
    started = "" if start is None else f", which started from the adapter {code(_model_name(start))},"
    pairs, steps = _pairs(summary), counted(summary["steps"], "step")
    verdict = summary["verdict"]
    findings = "\n".join(f"- {inert(finding['text'])}" for finding in verdict["findings"])
    return (
        f"{what} {link}{bits}{started or ','} trained on {pairs} in {steps} with the loss {kinds} by "
        "dpo_dist.\n\n"
        f"{_averaging(config)}**Verdict:** {inert(verdict['sentence'])}"
        + (f"\n\n{findings}" if findings else "")
    )


def _averaging(config: RunConfig) -> str:
    """Return a paragraph about weights that are a moving average; "" for those of the last step."""
    if config.export.weights is ExportedWeights.last:
        return ""
    return (
        "The weights are the moving average over the steps of training, with a decay of "
        f"{config.trainer.ema_decay:g}. Verdict and curve are of the weights of each step themselves.\n\n"
    )


def _pairs(summary: Row) -> str:
    """Return the pairs of the training data; with their repetitions if training repeated some."""
    seen = summary["pairs_seen"]
    pairs = sum(counts["pairs"] for counts in summary["data"]["train"]["sources"])
    return counted(seen, "pair") if seen <= pairs else f"{counted(pairs, 'pair')} ({seen:,} with repetitions)"


def _loading(config: RunConfig) -> str:
    if config.model.adapter is None:
        return _python(
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "model = AutoModelForCausalLM.from_pretrained(folder, dtype='auto')",
        )
    loading = _python(
        "from peft import AutoPeftModelForCausalLM\nfrom transformers import AutoTokenizer",
        "model = AutoPeftModelForCausalLM.from_pretrained(folder, dtype='auto')",
    )
    base = code(_model_name(config.model.path))
    return (
        f"{loading}\n\nadapter_config.json has the place of the base, {base}, where it was trained. If the "
        "base is elsewhere: `PeftModel.from_pretrained(base_model, folder)`."
    )


def _python(imports: str, load: str) -> str:
    return (
        f"```python\n{imports}\n\nfolder = '.'  # this folder, or its name on the hub\n{load}\n"
        "tokenizer = AutoTokenizer.from_pretrained(folder)\n```"
    )


def _evaluation(evaluation: Mapping[str, Row]) -> str:
    rows = list(evaluation.items())[: _MOST_LABELS + 1]
    shown = {key: name for key, (_, name) in _METRICS.items() if any(key in row for _, row in rows)}
    lines = [["pairs of", "pairs", *shown.values()]]
    for label, row in rows:
        lines.append([code(label), f"{row['eval_pairs']:,}", *(_with_interval(row, key) for key in shown)])
    if not any("calibration" in row for _, row in rows):  # a loss of one response
        return table(lines)
    lines[0].append("calibration error")
    for line, (_, row) in zip(lines[1:], rows, strict=True):
        line.append(_number(row.get("calibration", {}).get("expected_calibration_error")))
    return f"{table(lines)}\n\n{_REWARDS}"


def _with_interval(row: Row, key: str) -> str:
    ends = row["intervals"].get(key)
    return _number(row.get(key)) + (f" [{_number(ends[0])}, {_number(ends[1])}]" if ends else "")


def _number(value: float | None) -> str:
    return "" if value is None or not math.isfinite(value) else number(value)


def _curve(rows: Sequence[Row]) -> str:
    """Return a table of evaluations, evenly thinned, with the first and the last."""
    found = [row for row in rows if "eval_loss" in row]
    shown = {key: name for key, name in _CURVES.items() if any(key in row for row in found)}
    lines = [
        [f"{row['step']:,}", *(_number(row.get(key)) for key in shown)]
        for row in evenly(found, _MOST_EVALUATIONS)
    ]
    return table([["step", *shown.values()], *lines])


def _data(config: RunConfig, summary: Row) -> str:
    lines = [["used for", "source", "records", "kept", "dropped", "pairs"]]
    for part in summary["data"]:
        for counts, source in _sources(config, summary, part):
            dropped = ", ".join(f"{number} {reason}" for reason, number in sorted(counts["dropped"].items()))
            hub = _hub_dataset(source)
            label = code(counts["label"]) if hub is None else f"[{inert(hub)}](https://hf.co/datasets/{hub})"
            numbers = [f"{counts[key]:,}" for key in ("read", "kept")]
            lines.append([part, label, *numbers, inert(dropped), f"{counts['pairs']:,}"])
    return table(lines)


def _training(config: RunConfig) -> str:
    found = {key: value for key, value in settings(config).items() if key not in _PATHS}
    if config.reference.path is not None:
        found["reference.path"] = _model_name(config.reference.path)
    if config.data.chat_template is not None:
        found["data.chat_template"] = Path(config.data.chat_template).name
    if (adapter := config.model.adapter) is not None and adapter.path is not None:
        found["model.adapter"] = {**found["model.adapter"], "path": _model_name(adapter.path)}
    return _facts("key", "value", found)


def _facts(name: str, value: str, facts: Row) -> str:
    return table([[name, value], *([code(key), code(str(fact))] for key, fact in facts.items())])
