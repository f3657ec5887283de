"""Compare CPU seconds of training on pairs with images with TRL's, which has no stored reference for images.

Both train the text part of one small Qwen2.5-VL with random weights on the same pairs, each with an image of
640 x 480 pixels; every step has all pairs, so that the losses can be compared. If they differ, the exit code
is 1. Ratios are TRL's CPU seconds of a step to those of dpo_dist: with a filled store, and in a first epoch,
with the reference's scoring; as [median, minimum, maximum] over rounds.
"""

import json
import statistics
import sys
import tempfile
import time
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.options import Benchmark, Json
from benchmarks.runs import Run, in_fork, python, start
from benchmarks.setting import Setting, pairs_file

_TOLERANCE = 1e-4
_MODEL, _PAIRS_OF_TRL = "model", 4
_SPECIAL = ["<pad>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]
_SPECIAL += ["<|video_pad|>"]
_WORDS = [f"w{number}" for number in range(1000)]
_TEMPLATE = (
    "{% for m in messages %}<|im_start|> {{ m['role'] }} {% if m['content'] is string %}{{ m['content'] }}"
    "{% else %}{% for part in m['content'] %}{% if part['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %} {{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|> assistant {% endif %}"
)
_TEXT: Json = {
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
}
_TEXT |= {"num_key_value_heads": 4, "max_position_embeddings": 4096, "bos_token_id": None, "eos_token_id": 2}
_TEXT |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 12, 12]}}
_VISION: Json = {
    "depth": 6,
    "hidden_size": 160,
    "intermediate_size": 432,
    "num_heads": 4,
    "out_hidden_size": 512,
}
_VISION |= {"window_size": 112, "fullatt_block_indexes": [2, 5]}
_PLACES = {"vision_start_token_id": 3, "vision_end_token_id": 4, "image_token_id": 5, "video_token_id": 6}


def run(options: Namespace) -> Json:
    """Measure both trainers."""
    setting = Setting("a small Qwen2.5-VL", options.pairs, options.pairs, max_length=2048)
    rounds: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory(dir=options.work) as name:
        folder = Path(name)
        in_fork(lambda: _prepare(setting, folder))
        for number in range(options.rounds):
            chosen = "model.images.train=none", f"trainer.epochs={options.steps}", "trainer.max_steps=null"
            ours = Run(str(folder), "dpo_dist", str(folder / f"store-{number}"), chosen, saves=False)
            cold, warm = start(ours, threads=1), start(ours, threads=1)
            python(["-m", "benchmarks.images", name, str(options.steps)], {"OMP_NUM_THREADS": "1"})
            trl = json.loads((folder / "trl.json").read_text())
            step, scoring = warm["training"]["cpu_seconds"] / options.steps, cold["reference"]["cpu_seconds"]
            theirs = trl["cpu_seconds"] / options.steps
            losses = zip([row["loss"] for row in warm["rows"]], trl["losses"], strict=True)
            rounds.append(
                {
                    "stored": theirs / step,
                    "first epoch": theirs / (step + scoring),
                    "difference": max(abs(ours - theirs) for ours, theirs in losses),
                    "seconds of a step": step,
                    "of scoring": scoring,
                    "of TRL's step": theirs,
                }
            )
    columns = {name: [each[name] for each in rounds] for name in rounds[0]}
    figures = {
        name: [statistics.median(values), min(values), max(values)] for name, values in columns.items()
    }
    return {"trainers_agree": figures["difference"][2] <= _TOLERANCE, **figures}


def _prepare(setting: Setting, folder: Path) -> None:
    """Write the model with its processor, the pictures and the pairs."""
    import torch
    from PIL import Image
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    setting.write(folder)
    vocabulary = {word: at for at, word in enumerate([*_SPECIAL, "<unk>", "user", "assistant", *_WORDS])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))  # noqa: S106  (no password)
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    raw.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in _SPECIAL])
    named = {"unk_token": "<unk>", "pad_token": "<pad>", "eos_token": "<|im_end|>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, chat_template=_TEMPLATE, **named)
    tokenizer.save_pretrained(folder / _MODEL)
    Qwen2VLImageProcessorPil().save_pretrained(folder / _MODEL)
    text = _TEXT | {"vocab_size": len(vocabulary), "pad_token_id": 0}
    torch.manual_seed(setting.seed)
    config = Qwen2_5_VLConfig(text_config=text, vision_config=_VISION, **_PLACES)
    Qwen2_5_VLForConditionalGeneration(config).save_pretrained(folder / _MODEL)
    random = np.random.default_rng(setting.seed)
    with pairs_file(setting, folder).open("w") as file:
        for number in range(setting.pairs):
            pixels = random.integers(0, 256, (48, 64, 3), dtype=np.uint8)
            Image.fromarray(pixels).resize((640, 480)).save(folder / f"{number}.png")
            sizes = {"prompt": 30, **dict.fromkeys(("chosen", "rejected"), 100)}
            texts = {name: " ".join(random.choice(_WORDS, size)) for name, size in sizes.items()}
            turns = {name: [{"role": "assistant", "content": texts[name]}] for name in ("chosen", "rejected")}
            turns["prompt"] = [{"role": "user", "content": texts["prompt"]}]
            file.write(json.dumps({"images": [f"{number}.png"], **turns}) + "\n")


def _train_with_trl(folder: Path, steps: int) -> None:
    """Train with TRL and write its CPU seconds and losses."""
    import torch
    from datasets import Dataset
    from PIL import Image
    from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration
    from trl.trainer.dpo_config import DPOConfig
    from trl.trainer.dpo_trainer import DPOTrainer

    from dpo_dist.data import ImageProcessor

    setting = Setting.read(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder / _MODEL)
    # AutoProcessor would need torchvision, which has other pixels.
    processor: Any = ImageProcessor(folder / _MODEL, tokenizer)._processor
    processor.chat_template, processor.tokenizer = tokenizer.chat_template, tokenizer
    records = [json.loads(line) for line in pairs_file(setting, folder).open()]
    for record in records:
        record["images"] = [Image.open(folder / name).convert("RGB") for name in record["images"]]

    def model() -> Any:
        return Qwen2_5_VLForConditionalGeneration.from_pretrained(folder / _MODEL, dtype=torch.float32)

    policy = model()
    for name, weight in policy.named_parameters():
        weight.requires_grad_("visual" not in name)
    config = DPOConfig(
        output_dir=str(folder / "trl"),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        max_length=None,
        max_steps=steps,
        per_device_train_batch_size=_PAIRS_OF_TRL,
        gradient_accumulation_steps=setting.pairs // _PAIRS_OF_TRL,
        learning_rate=1e-4,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = DPOTrainer(
        model=policy,
        ref_model=model(),
        args=config,
        train_dataset=Dataset.from_list(records),
        processing_class=processor,
    )
    started = time.process_time()
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    figures = {"cpu_seconds": time.process_time() - started, "losses": losses}
    (folder / "trl.json").write_text(json.dumps(figures))


def _own_options(parser: ArgumentParser) -> None:
    parser.add_argument("--steps", type=int, default=3, help="steps, each of all pairs")


def _fault(options: Namespace) -> str:
    return "" if options.pairs % _PAIRS_OF_TRL == 0 else f"pairs must be a multiple of {_PAIRS_OF_TRL}"


BENCHMARK = Benchmark(run, {"pairs": 8, "rounds": 2}, _own_options, {"pairs": 4, "rounds": 1}, _fault)

if __name__ == "__main__":
    _train_with_trl(Path(sys.argv[1]), int(sys.argv[2]))
