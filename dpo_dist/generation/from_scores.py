"""Pairs from responses that are scored in the data: rankings, scored lists, scored pairs."""

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from dpo_dist.config.identity import plain
from dpo_dist.config.pairs_schema import PairsMethod
from dpo_dist.config.schema import RunConfig
from dpo_dist.data.formats import read_records
from dpo_dist.data.records import PreferenceRecord
from dpo_dist.data.sources import pinned
from dpo_dist.digests import text_digest
from dpo_dist.generation.counted import good_records
from dpo_dist.generation.pair_records import pair_fields
from dpo_dist.generation.pairing import Selection, select_pairs
from dpo_dist.generation.prompts import prompt_key
from dpo_dist.generation.startup import output_file
from dpo_dist.generation.summary import check_output, write_results


def pairs_from_scores(config: RunConfig, say: Callable[[str], None]) -> None:
    """Write the pairs of all scored records of `data.train`, in their order.

    Raises:
        DataError: a source cannot be read, too many of its records are bad, or no pair can be made.
        ConfigError: the file exists and was made with other settings.
    """
    counts: Counter[str] = Counter()
    file, pairs = output_file(config), config.pairs
    settings = {
        "method": str(pairs.method),
        "sources": plain(config.data.train),
        "select": str(pairs.select),
        "margin": pairs.margin,
        "limit": pairs.limit,
        "seed": pairs.seed,
    }
    check_output(file, settings)
    write_results(file, _pairs(config, counts, say), settings, counts, say)


def _pairs(config: RunConfig, counts: Counter[str], say: Callable[[str], None]) -> Iterator[dict[str, Any]]:
    chosen_by = Selection(config.pairs.select, config.pairs.margin, config.pairs.seed)
    for record in _records(config, say, lambda: counts["prompts"] == config.pairs.limit):
        counts["prompts"] += 1
        scores = record.scores
        if scores is None:
            counts["without_scores"] += 1
            continue
        key = text_digest(f"{prompt_key(record)} {record.responses}")
        for better, worse in select_pairs(scores, chosen_by, key, counts):
            counts["order_changed"] += better > worse
            yield pair_fields(
                record,
                (record.responses[better], record.responses[worse]),
                (scores[better], scores[worse]),
                {
                    "source": str(record.origin),
                    "method": str(PairsMethod.scores),
                    "select": str(chosen_by.select),
                    "margin": chosen_by.margin,
                    "seed": chosen_by.seed,
                    "ranks": [better + 1, worse + 1],
                    "responses": len(record.responses),
                },
            )


def _records(
    config: RunConfig, say: Callable[[str], None], enough: Callable[[], bool]
) -> Iterator[PreferenceRecord]:
    for source in config.data.train:
        if not enough():
            yield from good_records(read_records(pinned(source, None)), source, config.data, say, enough)
