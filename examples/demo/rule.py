"""The demo's rule, which one can see in the text: a good answer begins by addressing the asker by name."""

import re
from collections.abc import Mapping, Sequence

INTRODUCTIONS = ("I am {name}.", "My name is {name}.", "This is {name}.", "{name} here.")
ADDRESS = "Dear {name}, "

_ASKER = re.compile("|".join(re.escape(text).replace(r"\{name\}", r"(\w+)") for text in INTRODUCTIONS))


def asker(prompt: Sequence[Mapping[str, str]]) -> str:
    """The name by which the user introduces themselves in a conversation of `role`/`content` messages.

    Raises:
        ValueError: nobody introduces themselves.
    """
    text = prompt[-1]["content"]
    found = _ASKER.match(text)
    if found is None:
        raise ValueError(f"nobody introduces themselves in {text!r}")
    return next(name for name in found.groups() if name)


def follows_rule(prompt: Sequence[Mapping[str, str]], answer: str) -> bool:
    """Whether `answer` begins by addressing the asker."""
    return answer.startswith(ADDRESS.format(name=asker(prompt)))
