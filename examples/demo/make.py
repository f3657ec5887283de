"""Make the demo's assets: a small model with random weights, its tokenizer, and pairs from a seeded grammar.

    python -m examples.demo.make OUT [--seed 0]

writes OUT/base, OUT/pairs_train.jsonl, OUT/pairs_eval.jsonl and OUT/warmup_train.jsonl. The bytes depend only
on seed, source and library versions, which OUT/demo.json records; if all files exist, nothing is written.
No asker asks about the same thing in pairs_eval and in another file.
"""

import argparse
import hashlib
import json
import random
import sys
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

from dpo_dist.foundation.errors import ConfigError, DpoDistError
from dpo_dist.foundation.files import staged_folder
from examples.demo.grammar import NAMES, QUESTIONS, Question, bad_answer, good_answer

TRAIN_PAIRS = 3000
EVAL_PAIRS = 300
WARMUP_PAIRS = 6000
WARMUP_GOOD_SHARE = 0.3
VOCABULARY = 1024
END_OF_TURN = "<|im_end|>"
MANIFEST = "demo.json"
MADE_FROM = ("grammar.py", "make.py")
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

Record = dict[str, list[dict[str, str]]]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    try:
        made = make_demo(arguments.out, arguments.seed)
    except DpoDistError as error:
        print(error.block(), file=sys.stderr)
        return error.exit_code
    print(f"{'made' if made else 'found'} the demo's model and pairs in {arguments.out}")
    return 0


def make_demo(out: Path, seed: int) -> bool:
    """Write the assets to the folder `out`; return False if they exist already.

    Raises:
        ConfigError: `out` contains files that this script did not write.
    """
    recipe = {"seed": seed, **_versions()}
    if _is_made(out, recipe):
        return False
    _check_foreign_files(out)
    with staged_folder(out) as folder:
        records = make_records(seed)
        for name, rows in records.items():
            lines = (json.dumps(row, ensure_ascii=False) for row in rows)
            (folder / f"{name}.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        _save_base(folder / "base", _texts(records), seed)
        manifest = {"recipe": recipe, "files": _digests(folder)}
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    return True


def make_records(seed: int) -> dict[str, list[Record]]:
    """Return the conversational records of the three files, by file name without ending."""
    draw = random.Random(seed)
    asked = [(name, question) for name in NAMES for question in QUESTIONS]
    draw.shuffle(asked)
    held_out, seen = asked[:EVAL_PAIRS], asked[EVAL_PAIRS:]
    return {
        "pairs_train": [_pair(*draw.choice(seen), 1.0, draw) for _ in range(TRAIN_PAIRS)],
        "pairs_eval": [_pair(*one, 1.0, draw) for one in held_out],
        "warmup_train": [_pair(*draw.choice(seen), WARMUP_GOOD_SHARE, draw) for _ in range(WARMUP_PAIRS)],
    }


def _pair(name: str, question: Question, good_share: float, draw: random.Random) -> Record:
    """Return a prompt with two answers; `good_share` is the probability that the good one is chosen.

    The wordings of the answers are drawn independently, so that wording and length do not show which is good.
    """
    prompt = question.ask(name, draw)
    answers = [good_answer(name, question.answer(draw)), bad_answer(name, question.answer(draw), draw)]
    chosen, rejected = answers if draw.random() < good_share else reversed(answers)
    return {
        "prompt": [{"role": "user", "content": prompt}],
        "chosen": [{"role": "assistant", "content": chosen}],
        "rejected": [{"role": "assistant", "content": rejected}],
    }


def _texts(records: dict[str, list[Record]]) -> Iterable[str]:
    """Yield every message with its role: without the roles, the tokenizer would have no tokens for them."""
    for rows in records.values():
        for row in rows:
            for (message,) in row.values():
                yield f"{message['role']}\n{message['content']}"


def _save_base(folder: Path, texts: Iterable[str], seed: int) -> None:
    """Write a byte-level BPE tokenizer trained on `texts`, and a Qwen2 model of a million random weights."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    tokenizer = Qwen2Tokenizer().train_new_from_iterator(
        texts, VOCABULARY, new_special_tokens=["<|im_start|>", END_OF_TURN], show_progress=False
    )
    tokenizer.eos_token = END_OF_TURN
    tokenizer.chat_template = CHAT_TEMPLATE
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.08,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    torch.manual_seed(seed)
    Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _versions() -> dict[str, str]:
    """Return the digest of the source and the library versions on which the bytes depend."""
    source = b"".join((Path(__file__).parent / name).read_bytes() for name in MADE_FROM)
    libraries = {name: metadata.version(name) for name in ("tokenizers", "torch", "transformers")}
    return {"source": hashlib.sha256(source).hexdigest(), **libraries}


def _is_made(out: Path, recipe: dict[str, object]) -> bool:
    manifest = _manifest(out)
    return manifest.get("recipe") == recipe and manifest.get("files") == _digests(out)


def _manifest(out: Path) -> dict[str, object]:
    if not (out / MANIFEST).is_file():
        return {}
    content: dict[str, object] = json.loads((out / MANIFEST).read_text(encoding="utf-8"))
    return content


def _digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def _check_foreign_files(out: Path) -> None:
    """Check that the folder is new or contains only an earlier demo."""
    if not out.exists():
        return
    if not out.is_dir():
        raise ConfigError("the demo's folder is a file", where=str(out), remedy="give another folder")
    files = _manifest(out).get("files", {})
    assert isinstance(files, dict)
    known = {MANIFEST, *(Path(name).parts[0] for name in files)}
    foreign = sorted(path.name for path in out.iterdir() if path.name not in known)
    if foreign:
        raise ConfigError(
            "the demo's folder contains other files",
            where=str(out),
            got=", ".join(foreign[:3]),
            expected="a new folder, or one written by this script",
            remedy="give another folder, or delete this one",
        )


if __name__ == "__main__":
    sys.exit(main())
