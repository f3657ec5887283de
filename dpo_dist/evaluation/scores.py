"""The file of the scores of every pair, one JSON record a line, in the order of the data."""

import json
import math
from collections.abc import Iterator
from pathlib import Path

from dpo_dist.atomic import staged_file
from dpo_dist.data.dataset import PreferenceDataset
from dpo_dist.objective.pair_values import PairValues

_NAMES = {
    "reward_chosen": "reward_chosen",
    "reward_rejected": "reward_rejected",
    "margin": "margin",
    "logp_chosen": "logp_chosen",
    "logp_rejected": "logp_rejected",
    "reference_logp_chosen": "reference_chosen",
    "reference_logp_rejected": "reference_rejected",
}
_LENGTHS = ("tokens_chosen", "tokens_rejected")


def write_scores(file: Path, values: PairValues, dataset: PreferenceDataset) -> None:
    """Write the scores of all pairs, whole or not at all.

    A record has `source` (its label), `file` and `line`, then rewards, log-probs in nats and lengths in
    tokens of both sides. Values that do not exist (of a reference, if there is none) are null.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with staged_file(file) as temporary, temporary.open("w", encoding="utf-8") as lines:
        for index, label in enumerate(_labels(dataset)):
            origin = dataset.origin(index)
            record: dict[str, str | int | float | None] = {
                "source": label,
                "file": origin.source,
                "line": origin.line,
            }
            for name, column in _NAMES.items():
                value = float(vars(values)[column][index])
                record[name] = value if math.isfinite(value) else None
            record |= {name: int(vars(values)[name][index]) for name in _LENGTHS}
            lines.write(json.dumps(record, ensure_ascii=False) + "\n")


def _labels(dataset: PreferenceDataset) -> Iterator[str]:
    """Yield the label of each example."""
    for label, pairs in zip(dataset.source_labels, dataset.source_pairs, strict=True):
        for _ in range(pairs):
            yield label
