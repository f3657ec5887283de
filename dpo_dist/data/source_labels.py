"""Labels of the sources of a list, by which metrics and counts name them."""

import itertools
import re
from collections.abc import Iterator, Sequence
from pathlib import PurePath

from dpo_dist.config.data_schema import SourceConfig
from dpo_dist.data.fields.dataset_info import resolved
from dpo_dist.data.files.read_file import KINDS

_SUFFIXES = (*KINDS, ".gz", ".zst")
# Names of files and folders that say nothing without the folder above.
_USUAL_NAMES = frozenset({"data", "dev", "eval", "test", "train", "training", "val", "validation"})


def source_labels(sources: Sequence[SourceConfig]) -> list[str]:
    """Return a label for each source: its own `label`, or the shortest name that no other has.

    Derived names are unique in the list: the name of file, folder, dataset or entry, then with subset, folder
    and split, then with the folders above; equal sources are numbered. Sources with the same own `label`
    share it.
    """
    names = {_location(source): list(_candidates(source)) for source in sources if source.label is None}
    own = {source.label for source in sources if source.label is not None}
    labels: list[str] = []
    for source in sources:
        if source.label is not None:
            labels.append(source.label)
            continue
        here = names[_location(source)]
        others = set(itertools.chain(*(each for each in names.values() if each is not here)))
        name = next((name for name in here if name not in others | own), here[-1])
        labels.append(_unused(name, {*own, *labels, *(others - {name})}))
    return labels


def _location(source: SourceConfig) -> tuple[str | None, ...]:
    return source.path, source.name, source.data_dir, source.split, source.revision


def _unused(label: str, taken: set[str]) -> str:
    numbered = (f"{label}-{number}" for number in itertools.count(2))
    return label if label not in taken else next(each for each in numbered if each not in taken)


def _candidates(source: SourceConfig) -> Iterator[str]:
    """Yield names of a source, short ones first; at least one."""
    if source.name is not None and resolved(source) is not source:
        yield _safe(source.name)
    *folders, last = [*filter(None, map(_safe, _without_suffixes(source.path).parts))] or ["source"]
    qualifiers = [_safe(each) for each in (source.name, source.data_dir, source.split) if each]
    if last not in _USUAL_NAMES or not folders:
        for count in range(len(qualifiers) + 1):
            yield "-".join([last, *qualifiers[:count]])
    for start in range(len(folders) - 1, -1, -1):
        yield "-".join([*folders[start:], last, *qualifiers])


def _without_suffixes(path: str) -> PurePath:
    found = PurePath(path)
    while found.suffix in _SUFFIXES:
        found = found.with_suffix("")
    return found


def _safe(text: str) -> str:
    """Return `text` without characters that separate parts of a metric's name or of a path."""
    return re.sub(r"[^\w.+]+", "-", text).strip("-.")
