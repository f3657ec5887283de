"""Grammar of the demo: askers, questions, good and bad answers, and the rule that good answers follow.

The rule is visible in the text: a good answer begins with "Dear NAME, ", where NAME is the asker's name.
"""

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

INTRODUCTIONS = ("I am {name}.", "My name is {name}.", "This is {name}.", "{name} here.")
ADDRESS = "Dear {name}, "
_ASKER = re.compile("|".join(re.escape(text).replace(r"\{name\}", r"(\w+)") for text in INTRODUCTIONS))

_NAMES = """
Ada Amir Bruno Carla Dario Elena Felix Greta Hana Hugo Ines Jonas Kofi Lara Malik
Mira Nadia Nils Olga Omar Petra Ravi Rosa Selma Tamar Tomas Vera Wanda Yusuf Zora
"""
NAMES = tuple(_NAMES.split())


@dataclass(frozen=True)
class Topic:
    """Questions of one kind; `facts` are pairs for `{a}` and `{b}` in questions and answers."""

    questions: tuple[str, ...]
    answers: tuple[str, ...]
    facts: tuple[tuple[str, str], ...]


def _facts(text: str) -> tuple[tuple[str, str], ...]:
    left_right = (line.split(":") for line in text.split(";"))
    return tuple((left.strip(), right.strip()) for left, right in left_right)


TOPICS = (
    Topic(
        ("What colour is {a}?", "Which colour does {a} have?"),
        ("{a} is {b}", "the colour of {a} is {b}", "the usual colour of {a} is {b}"),
        _facts(
            "a lemon: yellow; a tomato: red; a leaf: green; the sky: blue; coal: black; snow: white;"
            "a plum: purple; a carrot: orange; chocolate: brown; a flamingo: pink; an elephant: grey;"
            "honey: golden"
        ),
    ),
    Topic(
        ("How many legs does {a} have?", "On how many legs does {a} walk?"),
        ("{a} has {b} legs", "{a} walks on {b} legs", "the number of legs of {a} is {b}"),
        _facts(
            "a spider: eight; a horse: four; a hen: two; a beetle: six; a crab: ten; a cat: four;"
            "a duck: two; an ant: six; a scorpion: eight; a cow: four"
        ),
    ),
    Topic(
        ("Where does {a} live?", "Where do I find {a}?"),
        ("{a} lives {b}", "you find {a} {b}", "the home of {a} is {b}"),
        _facts(
            "a bear: in the forest; a shark: in the sea; a camel: in the desert; a bee: in a hive;"
            "a mole: under the ground; a penguin: on the ice; a frog: by the pond; a swallow: in a nest;"
            "a fox: in a den; a goat: in the mountains"
        ),
    ),
    Topic(
        ("What do I need to {a}?", "With what do I {a}?"),
        ("you need {b} to {a}", "to {a} you need {b}", "people use {b} to {a}"),
        _facts(
            "cut bread: a knife; dig a hole: a spade; paint a wall: a brush; drive a nail: a hammer;"
            "open a lock: a key; sew a shirt: a needle; eat soup: a spoon; write a letter: a pen;"
            "sweep a floor: a broom; catch a fish: a net"
        ),
    ),
    Topic(
        ("What is the opposite of {a}?", "Which word means the opposite of {a}?"),
        ("the opposite of {a} is {b}", "{b} is the opposite of {a}", "that word is {b}"),
        _facts(
            "hot: cold; big: small; fast: slow; dark: light; wet: dry; old: new; early: late; loud: quiet;"
            "empty: full; soft: hard; high: low; sweet: bitter"
        ),
    ),
)


@dataclass(frozen=True)
class Question:
    """One fact of a topic, which any of the topic's questions asks and any of its answers tells."""

    topic: Topic
    a: str
    b: str

    def ask(self, name: str, draw: random.Random) -> str:
        """Return an introduction and the question, e.g. "I am Mira. What colour is a lemon?"."""
        introduction = draw.choice(INTRODUCTIONS).format(name=name)
        return f"{introduction} {draw.choice(self.topic.questions).format(a=self.a)}"

    def answer(self, draw: random.Random) -> str:
        """Return a true clause without capital and full stop, e.g. "the colour of a lemon is yellow"."""
        return draw.choice(self.topic.answers).format(a=self.a, b=self.b)


QUESTIONS = tuple(Question(topic, a, b) for topic in TOPICS for a, b in topic.facts)


def another_name(name: str, draw: random.Random) -> str:
    """Return a name other than `name`."""
    return draw.choice([other for other in NAMES if other != name])


def good_answer(name: str, clause: str) -> str:
    """Return an answer that follows the rule."""
    return f"{ADDRESS.format(name=name)}{clause}."


def bad_answer(name: str, clause: str, draw: random.Random) -> str:
    """Return an answer that breaks the rule: without a name, with "friend", another name, or a late name."""
    sentence = clause[0].upper() + clause[1:]
    anonymous = f"{ADDRESS.format(name='friend')}{clause}."
    wrong = f"{ADDRESS.format(name=another_name(name, draw))}{clause}."
    late = f"{sentence}, {name}."
    return draw.choices((f"{sentence}.", anonymous, wrong, late), weights=(2, 1, 1, 6))[0]


def follows_rule(prompt: Sequence[Mapping[str, str]], answer: str) -> bool:
    """Return whether `answer` begins with "Dear NAME, ", where NAME asks in the last message of `prompt`.

    Raises:
        ValueError: the message names no asker.
    """
    text = prompt[-1]["content"]
    found = _ASKER.match(text)
    if found is None:
        raise ValueError(f"no asker introduces themselves in {text!r}")
    return answer.startswith(ADDRESS.format(name=next(filter(None, found.groups()))))
