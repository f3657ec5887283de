"""Inputs of a benchmark: pairs, a tokenizer trained on the pairs, random weights, and the pairs' order."""

import dataclasses
import itertools
import json
import os
import random
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
ORDER = "order.json"
REAL_DATA = {"hh": "hh_rlhf_sample.jsonl", "ultrafeedback": "ultrafeedback_plain_scored.jsonl"}
_SETTING = "setting.json"
_SYNTHETIC_PAIRS = 512
_SYNTHETIC_WORDS = 2000
# Slices of real data do not give more; a larger model's vocabulary has rows that no token uses.
TOKENIZER_VOCABULARY = 16384


@dataclass(frozen=True)
class Shape:
    """Sizes of a Qwen2 model; by default heads have 64 dimensions, and two query heads share a key head."""

    vocabulary: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int = 0
    key_heads: int = 0
    tied: bool = True
    saved_in: str = "float32"


SHAPES = {
    "tiny": Shape(512, 128, 256, 2),
    "5m": Shape(16384, 192, 512, 4),
    "40m": Shape(16384, 512, 1536, 10),
    "160m": Shape(16384, 1024, 2816, 13),
    "1.5b": Shape(151936, 1536, 8960, 28, heads=12, key_heads=2, saved_in="bfloat16"),
    "7b": Shape(152064, 3584, 18944, 28, heads=28, key_heads=4, tied=False, saved_in="bfloat16"),
}


def shared_data() -> Path:
    """Return the folder of real preference data, which may not exist."""
    return Path(os.environ.get("DPO_DIST_SHARED", ROOT.parent / "shared")) / "data"


def default_data() -> str:
    """Return `hh` if its slice exists, else `synthetic`."""
    return "hh" if (shared_data() / REAL_DATA["hh"]).is_file() else "synthetic"


@dataclass(frozen=True)
class Setting:
    """Model, data and batch of a run; lengths are tokens of a prompt with one response.

    Attributes:
        data: `hh`, `ultrafeedback` or `synthetic`.
        shared_prefix: the prompt's share of a sequence (synthetic pairs).
        mean_tokens: mean length of a sequence (synthetic pairs).
        length_spread: sigma of the lognormal distribution of lengths (synthetic pairs).
        layers: number of layers; None for the shape's number.
    """

    model: str
    pairs: int
    batch_pairs: int
    data: str = "synthetic"
    max_length: int = 1024
    dtype: str = "fp32"
    micro_batch_tokens: int = 4096
    trl_micro_pairs: int = 8
    shared_prefix: float = 0.7
    mean_tokens: int = 250
    length_spread: float = 0.7
    seed: int = 0
    layers: int | None = None

    @classmethod
    def from_options(cls, options: Namespace, **values: Any) -> "Setting":
        """Return the setting of command-line options; `values` override options."""
        named = {name: value for name, value in vars(options).items() if name in cls.__dataclass_fields__}
        return cls(**{**named, **values})

    @classmethod
    def read(cls, folder: Path) -> "Setting":
        """Return the setting of a prepared folder."""
        return cls(**json.loads((folder / _SETTING).read_text()))

    def write(self, folder: Path) -> None:
        """Write the setting of a folder that is prepared."""
        (folder / _SETTING).write_text(json.dumps(dataclasses.asdict(self)))

    @property
    def steps(self) -> int:
        """Optimizer steps of a run."""
        return self.pairs // self.batch_pairs


def pairs_file(setting: Setting, folder: Path) -> Path:
    """Return the file of pairs: a slice of real data, or the file that `prepare` writes."""
    if setting.data == "synthetic":
        return folder / "pairs.jsonl"
    return shared_data() / REAL_DATA[setting.data]


def overrides(setting: Setting, folder: Path, run_dir: Path, store: Path) -> list[str]:
    """Return the overrides of a run of dpo_dist; TRL gets the same optimizer and batch."""
    return [
        f"model.path={folder}/model",
        f"model.dtype={setting.dtype}",
        f"data.train=[{pairs_file(setting, folder)}]",
        f"data.cache={folder}/encoded",
        f"data.max_length={setting.max_length}",
        "data.max_bad_share=0.2",  # slices of real data have many bad records
        f"run.dir={run_dir}",
        f"reference.store={store}",
        f"trainer.global_batch_pairs={setting.batch_pairs}",
        f"trainer.micro_batch_tokens={setting.micro_batch_tokens}",
        f"trainer.max_steps={setting.steps}",
        f"trainer.seed={setting.seed}",
        "trainer.save_every=0",
        "optim.lr=1e-4",
        "optim.schedule=constant",
        "optim.warmup=0",
        "tracking=off",
    ]


def prepare(setting: Setting, folder: Path) -> None:
    """Write model, tokenizer, pairs, and the pairs' token ids in the order of training."""
    setting.write(folder)
    file = pairs_file(setting, folder)
    if setting.data == "synthetic":
        write_synthetic(file, setting)
    shape = SHAPES[setting.model]
    shape = dataclasses.replace(shape, layers=setting.layers or shape.layers)
    tokenizer = train_tokenizer(file, min(shape.vocabulary, TOKENIZER_VOCABULARY))
    tokens = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    save_random_model(shape, folder / "model", setting.seed, **tokens)
    tokenizer.save_pretrained(folder / "model")
    (folder / ORDER).write_text(json.dumps(_ordered_pairs(setting, folder)))


def write_synthetic(file: Path, setting: Setting, pairs: int = _SYNTHETIC_PAIRS) -> None:
    """Write `pairs` invented pairs of random words."""
    with file.open("w") as lines:
        for record in itertools.islice(_synthetic_records(setting), pairs):
            lines.write(f"{json.dumps(record)}\n")


def _synthetic_records(setting: Setting) -> Iterator[dict[str, str]]:
    draw = random.Random(setting.seed)
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["".join(draw.choices(letters, k=draw.randint(2, 5))) for _ in range(_SYNTHETIC_WORDS)]

    def text(mean: float) -> str:
        length = mean * draw.lognormvariate(-(setting.length_spread**2) / 2, setting.length_spread)
        return " ".join(draw.choices(words, k=max(1, round(length))))

    prompt = setting.mean_tokens * setting.shared_prefix
    response = setting.mean_tokens - prompt
    while True:
        yield {"prompt": text(prompt), "chosen": f" {text(response)}", "rejected": f" {text(response)}"}


def train_tokenizer(file: Path, vocabulary: int) -> Any:
    """Return a tokenizer of Qwen2's kind, trained on a file of pairs."""
    from transformers import Qwen2Tokenizer

    texts = (value for line in file.open() for value in json.loads(line).values() if isinstance(value, str))
    return Qwen2Tokenizer().train_new_from_iterator(texts, vocabulary, show_progress=False)


def model_config(shape: Shape, **token_ids: int) -> Any:
    """Return the Qwen2 configuration of this shape."""
    from transformers import Qwen2Config

    heads = shape.heads or shape.hidden_size // 64
    return Qwen2Config(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.layers,
        num_attention_heads=heads,
        num_key_value_heads=shape.key_heads or max(1, heads // 2),
        max_position_embeddings=4096,
        tie_word_embeddings=shape.tied,
        bos_token_id=None,
        **token_ids,
    )


def save_random_model(shape: Shape, folder: Path, seed: int, **token_ids: int) -> None:
    """Write a model of this shape with random weights."""
    import torch
    from transformers import Qwen2ForCausalLM

    torch.manual_seed(seed)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        config = model_config(shape, **token_ids)
        causal_lm = Qwen2ForCausalLM._from_config(config, dtype=getattr(torch, shape.saved_in))
    causal_lm.save_pretrained(folder)


def _ordered_pairs(setting: Setting, folder: Path) -> dict[str, Any]:
    from dpo_dist.batching.sampler import make_sampler
    from dpo_dist.config.load import load_run_config
    from dpo_dist.encoded.build import Preparation
    from dpo_dist.encoded.dataset import open_dataset
    from dpo_dist.model.files.load import load_tokenizer, tokenizer_digest

    config = load_run_config(overrides(setting, folder, folder / "unused", folder / "unused"))
    model = Path(config.model.path)
    tokenizer = load_tokenizer(model, config.model)
    encoded = Preparation(config.data.train, config.data, tokenizer, tokenizer_digest(model)).whole()
    dataset = open_dataset(encoded, config.data)
    sampler = make_sampler(dataset.spans([1.0]), config.trainer)
    indices = [int(index) for step in range(sampler.steps) for index in sampler.indices(step)]
    pairs = [dataset.example(index) for index in indices]
    return {
        "unique_tokens": sum(
            1 + sum(dataset.lengths(index)) - len(dataset.lengths(index)) for index in indices
        ),
        "prompt_ids": [pair.prompt_ids.tolist() for pair in pairs],
        "chosen_ids": [pair.responses[0].tolist() for pair in pairs],
        "rejected_ids": [pair.responses[1].tolist() for pair in pairs],
    }
