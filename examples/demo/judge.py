"""The demo's rule as a judge: `pairs.function=examples.demo.judge:rule_scores`."""

from collections.abc import Mapping, Sequence

from examples.demo.grammar import follows_rule


def rule_scores(prompt: Sequence[Mapping[str, str]], responses: Sequence[str]) -> list[float]:
    """Return, for each response, 1 if it begins with "Dear NAME, " (the asker's name), else 0."""
    return [float(follows_rule(prompt, response)) for response in responses]
