"""Translate another trainer's data into sources: mixtures, lists of datasets, names with a record count."""

import math
import re
from collections.abc import Mapping
from typing import Any

from dpo_dist.config.fields import as_written
from dpo_dist.config.other_trainers import as_sources
from dpo_dist.tools.convert.translation import EMPTY, Translation, as_list, finite_number

_SOURCE_KEYS = (
    *("path", "id", "name", "config", "split", "revision", "data_dir", "data_files", "weight"),
    *("limit", "type", "ds_type"),
)
_FORMATS = ("prompt_format", "chosen_format", "rejected_format", "completion_format")


def set_sources(run: Translation) -> None:
    """Set `data.train` and `data.eval`."""
    for target, entries in zip(("data.train", "data.eval"), _entries(run), strict=True):
        parts = (_source(run, f"{target}[{at}]", entry) for at, entry in enumerate(entries))
        if sources := [source for part in parts for source in part]:
            run.set(target, sources, target, entries)
        if run.trainer in ("ms-swift", "open-instruct") and "limit:" in as_written(sources):
            run.comments.append(
                "limit: takes the first records; there they are drawn, and repeated if too few"
            )


def _entries(run: Translation) -> tuple[list[Any], list[Any]]:
    """Return the datasets for training and for evaluation, in the form of TRL and axolotl."""
    if run.trainer in ("LLaMA-Factory", "ms-swift"):
        given = as_list(run.take("dataset")), as_list(run.take("eval_dataset", "val_dataset"))
        if run.trainer == "ms-swift":
            run.comments.append(
                "dataset, model: there from ModelScope unless use_hf is set; here from the hub"
            )
            train, tests = ([source for name in names for source in _swift_sources(name)] for names in given)
            return train, tests
        folder, limit = run.take("dataset_dir", default="data"), run.take("max_samples")
        train, tests = ([{"path": folder, "name": name, "limit": limit} for name in names] for names in given)
        return train, tests
    train, tests = run.take("datasets", default=[]), run.take("test_datasets", default=[])
    if isinstance(mixture := run.take("dataset_mixture"), dict):
        train = as_list(mixture.get("datasets"))
        run.left |= {key: value for key, value in mixture.items() if key not in ("datasets", "seed")}
    splits = run.take("dataset_splits", "mixer_list_splits", "dataset_mixer_list_splits")
    splits = [str(split) for split in as_list(splits)] or ["train"]
    for name, parts in _mixture(run):
        train += [{"path": name, "split": split} | parts for split in splits if "test" not in split]
        tests += [{"path": name, "split": split} for split in splits if "test" in split]
    if name := run.take("dataset_name"):
        source = {"path": name, "name": run.take("dataset_config", "dataset_config_name")}
        train = [source | {"split": run.take("dataset_train_split", default="train")}]
        split = run.take("dataset_test_split", default="test")
        strategies = [run.left.get(key) for key in ("eval_strategy", "evaluation_strategy", "do_eval")]
        tests = [source | {"split": split} for when in strategies if when not in (None, False, "no")][:1]
    return train, tests


def _mixture(run: Translation) -> list[tuple[str, dict[str, Any]]]:
    """Return the sources of a mixture, and the limit or weight of each."""
    shares = run.take("dataset_mixer", default={})
    flat, sources = as_list(run.take("mixer_list", "dataset_mixer_list")), []
    for name, written in (*shares.items(), *zip(flat[::2], flat[1::2], strict=False)):
        amount = finite_number(written) or 0
        # A number counts records if it is above 1 (in a mapping), or has no decimal point (in a list).
        is_share = amount <= 1 if shares else "." in str(written)
        if amount > 0:
            sources.append((str(name), {"weight": amount} if is_share else {"limit": math.ceil(amount)}))
        else:
            run.comment(f"dataset_mixer.{name}", written, "neither a share nor a number of records")
    return sources


def _source(run: Translation, place: str, entry: Any) -> list[Any]:
    """Return an entry of `datasets` as sources, one per file."""
    entry = dict(entry) if isinstance(entry, Mapping) else {"path": entry}
    entry = {"path": entry.get("id"), "name": entry.get("config")} | entry
    kind = entry.get("type") or {}
    if str(kind).startswith("passthrough"):
        run.values["data.template"] = "applied"
    elif isinstance(kind, str) and not kind.startswith("user_defined"):
        run.values["data.text_as_messages"] = True
    for option, value in (entry | (kind if isinstance(kind, dict) else {})).items():
        if option in _FORMATS and value not in (f"{{{option.removesuffix('_format')}}}", None, ""):
            run.comment(
                f"{place}.{option}",
                value,
                "texts are read without it: write reader: module:function at the source, or "
                "data.text_as_messages=true data.chat_template=FILE (docs/data.md)",
            )
        elif not (option in (*_SOURCE_KEYS, *_FORMATS) or option.startswith("field_") or value in EMPTY):
            run.comment(f"{place}.{option}", value, "formats are detected; for others docs/data.md")
    files = as_list(entry.get("data_files")) or [None]
    return [source for file in files for source in as_sources([entry | {"data_files": file}])]


def _swift_sources(entry: Any) -> list[dict[str, Any]]:
    """Return the sources of an ms-swift dataset such as `HF::ORG/NAME:SUBSET/SUBSET#1000`."""
    parts = re.fullmatch(r"(?:(?:HF|MS)::)?([^:#]+)(?::([^#]+))?(?:#(\d+))?", str(entry))
    if parts is None:
        return [{"path": str(entry)}]
    limit = int(parts[3]) if parts[3] else None
    return [{"path": parts[1], "name": name, "limit": limit} for name in (parts[2] or "").split("/")]
