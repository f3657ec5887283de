"""Labels of sources: metrics, tables and reports name a source by its label."""

import itertools
import re
from collections.abc import Sequence
from pathlib import PurePath

from dpo_dist.config.schema import SourceConfig
from dpo_dist.data.read.columns import resolve_source
from dpo_dist.data.read.files import SUFFIXES

# Names of files and folders that need the folder above to say what they are.
_USUAL_NAMES = frozenset({"data", "dev", "eval", "test", "train", "training", "val", "validation"})


def source_labels(sources: Sequence[SourceConfig]) -> list[str]:
    """Return a label for each source: its `label`, or its name, numbered where names are equal.

    Sources with the same `label` share it.
    """
    taken, labels = {source.label for source in sources}, list[str]()
    for source in sources:
        name = _name(source)
        names = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
        labels.append(source.label or next(name for name in names if name not in taken))
        taken.add(labels[-1])
    return labels


def _name(source: SourceConfig) -> str:
    """Return the name of a source's file, with subset, folder and split."""
    if source.name is not None and resolve_source(source) is not source:
        return _safe(source.name)
    file = PurePath(source.path)
    while file.suffix in SUFFIXES:
        file = file.with_suffix("")
    parts = [*filter(None, map(_safe, file.parts))] or ["source"]
    shown = parts[-2:] if parts[-1] in _USUAL_NAMES else parts[-1:]
    options = [_safe(each) for each in (source.name, source.data_dir, source.split) if each]
    return "-".join(filter(None, [*shown, *options]))


def _safe(text: str) -> str:
    """Return `text` without characters that separate parts of a metric's name or of a path."""
    return re.sub(r"[^\w.+]+", "-", text).strip("-.")
