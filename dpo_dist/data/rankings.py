"""A record of many responses as training examples; whatever its scores tie is no preference."""

import itertools

from dpo_dist.config.schema import Ranked
from dpo_dist.data.records import PreferenceRecord

Ranks = tuple[int, ...]


def training_examples(record: PreferenceRecord, ranked: Ranked) -> tuple[list[Ranks], int]:
    """The examples that a record gives, each as places of its responses, best first.

    A record of one or two responses is one example as it stands.

    Args:
        record: its scores, if it has more than two responses, do not rise and are not all equal.
        ranked: `whole`: one ranking, of equal scores the first response only; `best_worst`: the first and the
            last; `all_pairs`: every two whose scores are not equal.

    Returns:
        (examples, ties): at least one example, and how many responses (`whole`) or pairs (`all_pairs`) are
        left out because of equal scores.
    """
    places = range(len(record.responses))
    if len(places) <= 2:
        return [tuple(places)], 0
    # Without scores the order itself is the ranking.
    scores = record.scores or tuple(-float(place) for place in places)
    match ranked:
        case Ranked.whole:
            distinct = tuple(place for place in places if place == 0 or scores[place] != scores[place - 1])
            return [distinct], len(places) - len(distinct)
        case Ranked.best_worst:
            return [(0, places[-1])], 0
        case Ranked.all_pairs:
            pairs = list(itertools.combinations(places, 2))
            untied: list[Ranks] = [
                (better, worse) for better, worse in pairs if scores[better] != scores[worse]
            ]
            return untied, len(pairs) - len(untied)
