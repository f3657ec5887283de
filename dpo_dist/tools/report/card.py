"""Write a trained model's README.md: metadata for the hub, results, data and settings."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from dpo_dist.data import DataConfig, SourceConfig
from dpo_dist.foundation.errors import warn_on_bug
from dpo_dist.foundation.files import read_fields
from dpo_dist.foundation.streams import printable
from dpo_dist.foundation.text import as_yaml, pluralize, without_secrets
from dpo_dist.kit import (
    ACCURACIES,
    AGREEMENT,
    ALL,
    KINDS,
    MAIN,
    PREFIX,
    TERMS,
    LossConfig,
    LossKind,
    MetricsRow,
    ModelConfig,
    RunConfig,
    RunFolder,
    evaluation_cells,
)
from dpo_dist.tools.report.verdict import verdict

_Row = Mapping[str, Any]

_TEMPLATE = Path(__file__).with_name("card.md.jinja")
_SPECIAL = re.compile(r"([\\`*_{}\[\]<()#+!|~$@&]|:(?=//)|(?<=[wW]{3})\.)")
_HUB_MODEL = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)
_HUB_DATASET = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
_SNAPSHOT = re.compile(r"models--(?:([\w.-]+?)--)?([\w.-]+)")
"""A folder in the hub's cache."""
_FILE = re.compile(r".*\.(jsonl?|csv|tsv|parquet|arrow|txt|gz|zst|zip)")
_CAUSAL = "AutoModelForCausalLM"
_PATHS = ("model.path", "data.train", "data.eval", "reference.path", "data.chat_template")


def plain_line(value: object) -> Markup:
    """Return a value on one line without markup, links or HTML."""
    if isinstance(value, Markup):
        return value
    return Markup(_SPECIAL.sub(r"\\\1", printable(" ".join(str(value).split()))))  # noqa: S704


def code(value: object) -> Markup:
    """Return a value on one line as a code span, also within a table."""
    line = printable(" ".join(str(value).split())).replace("|", "\\|").replace("`", "'")
    return Markup(f"`{line or ' '}`")  # noqa: S704


def model_card(
    config: RunConfig,
    summary: _Row,
    evaluation: Mapping[str, _Row],
    versions: Mapping[str, str],
    loader: str = _CAUSAL,
) -> str:
    """Return the card of a run from its summary.json (with `verdict`) and evaluation.json.

    `loader`: the auto class of the model, or of an adapter's base.
    """
    # As on pages, every text of a template becomes inert.
    environment = Environment(
        finalize=plain_line, undefined=StrictUndefined, trim_blocks=True, autoescape=True
    )
    environment.filters |= {"code": code, "plain": Markup}
    adapter = config.model.adapter
    start = None
    if adapter is not None:
        if adapter.path is not None:
            start = _model_name(adapter.path)
        # peft has no auto class for models that read images, but transformers loads adapters, too.
        if loader == _CAUSAL:
            loader = "AutoPeftModelForCausalLM"
    name = _model_name(config.model.path)
    base = code(name)
    if hub_name(config.model.path) is not None:
        base = Markup(f"[{plain_line(name)}](https://huggingface.co/{name})")  # noqa: S704
    unit = config.loss.unit
    seen = summary["pairs_seen"]
    pairs = sum(counts["pairs"] for counts in summary["data"]["train"]["sources"])
    pairs_in_words = pluralize(seen, unit)
    if seen > pairs:
        pairs_in_words = f"{pluralize(pairs, unit)} ({seen:,} with repetitions)"
    head, *rows = evaluation_cells(evaluation, (*MAIN, *TERMS.values()))
    # The settings of the run; paths are shortened to their last part.
    values = {key: value for key, value in summary["settings"].items() if key not in _PATHS}
    if config.loss.of_scores:
        values = {key: value for key, value in values.items() if not key.startswith("reference.")}
    batch = "trainer.global_batch_pairs"
    values[batch] = summary.get("global_batch_pairs", values[batch])  # the default fits small data
    if config.reference.path is not None:
        values["reference.path"] = _model_name(config.reference.path)
    if config.data.chat_template is not None:
        values["data.chat_template"] = Path(config.data.chat_template).name
    if start is not None:
        values["model.adapter"] = {**values["model.adapter"], "path": start}
    averaged = ""
    if config.export.weights == "ema":
        averaged = f"{config.trainer.ema_decay:g}"
    best = summary.get("best_checkpoint") if "model_step" in summary else None
    body = environment.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(
        metadata=Markup("METADATA"),
        title=f"{name.rpartition('/')[2]}-{'+'.join(config.loss.kinds)}",
        adapter=adapter,
        base=base,
        base_name=name,
        quantized=config.model.quantization,
        start=start,
        has_scores=config.loss.of_scores,
        unit=unit,
        pairs=Markup(pairs_in_words),  # noqa: S704  (digits)
        steps=pluralize(summary["steps"], "step"),
        kinds=[(kind, "" if kind is LossKind.custom else KINDS[kind].source) for kind in config.loss.kinds],
        best=best,
        averaged=averaged,
        verdict=summary["verdict"],
        loader=loader,
        evaluation=evaluation and (head, [[code(label), *map(Markup, cells)] for label, *cells in rows]),
        teacher=(summary.get("reference") or {}).get("teacher", {}),
        agreement=evaluation.get(ALL, {}).get(PREFIX + AGREEMENT),
        reads_others=(summary.get("reference") or {}).get("reads_other_prompts", False),
        has_rewards=any(PREFIX + name in row for row in evaluation.values() for name in ACCURACIES),
        data=_data(config.data, summary),
        training=[(code(key), code(as_yaml(value))) for key, value in values.items()],
        versions=[(code(name), code(version)) for name, version in versions.items()],
    )
    metadata = _metadata(config.model, config.data, config.loss).to_yaml()
    text: str = without_secrets(re.sub(r"\n{3,}", "\n\n", str(body)))
    return text.replace("METADATA", metadata, 1) + "\n"


def hub_name(path: str) -> str | None:
    """Return the hub name of a model, also of a folder in the hub's cache; None for another folder."""
    folder = Path(path).expanduser()
    if not folder.is_dir():
        return path if _HUB_MODEL.fullmatch(path) else None
    for part in folder.resolve().parts:
        match = _SNAPSHOT.fullmatch(part)
        if match:
            organisation, name = match.groups()
            return f"{organisation}/{name}" if organisation else name
    return None


def _model_name(path: str) -> str:
    """Return a model's hub name or folder name; for a run's model, the name of the run directory."""
    name = hub_name(path)
    if name is not None:
        return name
    folder = Path(path).expanduser().resolve()
    run = RunFolder(folder.parent)
    is_of_run = folder == run.model and run.config.is_file()
    return run.path.name if is_of_run else folder.name


def _hub_dataset(source: SourceConfig) -> str | None:
    is_local = Path(source.path).expanduser().exists() or _FILE.fullmatch(source.path)
    return source.path if not is_local and _HUB_DATASET.fullmatch(source.path) else None


def _metadata(model: ModelConfig, data: DataConfig, loss: LossConfig) -> ModelCardData:
    base = hub_name(model.path)
    is_adapter = model.adapter is not None
    datasets = filter(None, map(_hub_dataset, data.train))
    kind = "dpo" if LossKind.sigmoid in loss.kinds else str(loss.kinds[0])
    tags = ["dpo-dist", *(["reward-model"] if loss.of_scores else ["preference-optimization", kind])]
    if is_adapter:
        tags.append("lora")
    metadata = ModelCardData(
        base_model=base,
        datasets=list(dict.fromkeys(datasets)) or None,
        library_name="peft" if is_adapter else "transformers",
        pipeline_tag="text-classification" if loss.of_scores else "text-generation",
        tags=tags,
    )
    if base is not None:
        metadata["base_model_relation"] = "adapter" if is_adapter else "finetune"
    return metadata


def _data(data: DataConfig, summary: _Row) -> Iterator[list[object]]:
    for part in summary["data"]:
        sources = data.train if part == "train" else data.eval_sources
        for counts, source in zip(summary["data"][part]["sources"], sources, strict=True):
            dropped = ", ".join(f"{count} {reason}" for reason, count in sorted(counts["dropped"].items()))
            hub = _hub_dataset(source)
            link = Markup(f"[{plain_line(hub)}](https://hf.co/datasets/{hub})")  # noqa: S704
            label = code(counts["label"]) if hub is None else link
            read, kept, pairs = (f"{counts[key]:,}" for key in ("read", "kept", "pairs"))
            yield [part, label, read, kept, dropped, pairs]


def run_card(
    config: RunConfig,
    rows: Sequence[MetricsRow],
    summary: dict[str, Any],
    warn: Callable[[str], None],
    versions: Mapping[str, str],
    loader: str,
    *,
    is_evaluated: bool,
) -> str:
    """Return a model card with a verdict; if a bug raises an exception, warn and return "".

    `rows`: of log_history.json, up to the model's step. `summary`: with `exit`, without `verdict`. `loader`:
    the model's auto class. `is_evaluated`: whether the last evaluation of training scored this model.
    """
    folder = RunFolder(config.run.path)
    evaluation = {}
    card = ""
    with warn_on_bug("the model card", warn):
        run_verdict = verdict(rows, summary)
        results = folder.last_evaluation.results
        if is_evaluated and results.is_file():
            evaluation = read_fields(results)
        summary_with_verdict = {**summary, "verdict": run_verdict.as_dict()}
        card += model_card(config, summary_with_verdict, evaluation, versions, loader)
    return card
