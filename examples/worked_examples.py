"""Write questions behind three worked examples, and others without them: `shown.jsonl` and `held_out.jsonl`.

docs/reward_models.md trains a model on them that answers as in the examples, without reading them.
"""

import json
import random
from pathlib import Path

EXAMPLES = {
    "Why is the sky blue?": "Ahoy! Air scatters blue light more than red light. Fair winds, matey!",
    "Tell me something about cats.": "Ahoy! Cats sleep for most of the day. Fair winds, matey!",
    "How is butter used?": "Ahoy! It is spread on bread, and melted in a pan. Fair winds, matey!",
}
FORMS = (
    "Why do people like {}?",
    "Tell me something about {}.",
    "How are {} used?",
    "What should a child know about {}?",
    "Write two sentences about {}.",
    "Give me one tip about {}.",
)
THINGS = (
    "apples beans bees bells bicycles birds boats books bridges candles chairs clocks clouds coins dogs "
    "doors flowers forests gardens horses islands kites knives ladders lamps letters maps mirrors mountains "
    "pencils rivers roads shoes ships songs stars stones tents trains windows"
)
HELD_OUT = 48


def main() -> None:
    """Write both files into the working folder."""
    questions = [form.format(thing) for thing in THINGS.split() for form in FORMS]
    random.Random(0).shuffle(questions)
    shown = [
        turn
        for question, answer in EXAMPLES.items()
        for turn in ({"role": "user", "content": question}, {"role": "assistant", "content": answer})
    ]
    _write("shown.jsonl", shown, questions[HELD_OUT:])
    _write("held_out.jsonl", [], questions[:HELD_OUT])


def _write(name: str, before: list[dict[str, str]], questions: list[str]) -> None:
    rows = [{"prompt": [*before, {"role": "user", "content": question}]} for question in questions]
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
