"""Invented preference pairs with real-looking spreads of length, the same on every machine."""

import json
import random
from pathlib import Path

_WORDS = [
    *("the", "sea", "weather", "story", "capital", "answer", "please", "write", "hello", "sorry", "cannot"),
    *("help", "France", "Paris", "first", "second", "something", "short", "about", "with", "and", "today"),
]


def write_pairs(file: Path, count: int, seed: int = 0, *, goes_on: bool = False) -> Path:
    """Conversational pairs; prompts of 1 to 60 words, answers of 1 to 40, some prompts with two turns.

    With `goes_on`, every third prompt is a later turn of the conversation before it.
    """
    random_source = random.Random(seed)

    def words(most: int) -> str:
        return " ".join(random_source.choices(_WORDS, k=random_source.randint(1, most)))

    rows = []
    for number in range(count):
        prompt = [{"role": "user", "content": f"{number} {words(60)}"}]
        if number % 3 == 0:
            prompt = [
                *prompt,
                {"role": "assistant", "content": words(20)},
                {"role": "user", "content": words(20)},
            ]
        elif goes_on and number % 3 == 2:
            prompt = [*rows[-1]["prompt"], *rows[-1]["chosen"], *prompt]
        rows.append(
            {
                "prompt": prompt,
                "chosen": [{"role": "assistant", "content": f"yes {words(40)}"}],
                "rejected": [{"role": "assistant", "content": f"no {words(40)}"}],
            }
        )
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file
