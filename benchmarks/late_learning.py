"""How much of what DPO learns at its small rates is in the bf16 weights that run and are saved?

    python benchmarks/late_learning.py MODEL PAIRS.jsonl RATE,RATE STEPS [FIGURE.png]

Trains the last four layers of a Llama in five ways from the same pairs: with float32 master weights and a
bf16 forward of them, rounded to the nearest or by chance, by `adamw_bf16`, by the same with rounding to the
nearest, and in float32 throughout. Prints how far the loss of training pairs and of held-out ones falls, and
the held-out accuracy, of the weights that the optimizer has, and of a bf16 model of them, rounded to the
nearest and by chance; and how much of the way of the master weights they have gone. All are evaluated in
float32.
"""

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo_dist.distributed import adamw_bf16
from dpo_dist.distributed.adamw_bf16 import AdamWBF16, round_by_chance

BEFORE, BEHIND = 16, 16  # tokens of a pair before and after its responses begin to differ
PAIRS = 64  # of training, and as many held out
OF_A_STEP = 4
BETA = 0.1
LAYERS = 4
IN_FIGURE = {
    "float32 masters, its own weights": "C0--",
    "float32 masters, in bf16 to the nearest": "C0-",
    "adamw_bf16": "C1-",
    "adamw_bf16 to the nearest": "C3-",
    "float32 throughout, its own weights": "C2:",
}


WAYS = ("masters", "forward by chance", "chance", "nearest", "float32")


class Point(NamedTuple):
    """How far losses have fallen at a step, and the share of the way of the master weights."""

    step: int
    training: float
    held_out: float
    share: float


def read_pairs(path: str, tokenizer: Any) -> Tensor:
    """Token ids of pairs, [pairs, 2, tokens]."""
    pairs = []
    with Path(path).open(encoding="utf-8") as lines:
        for line in lines:
            record = json.loads(line)
            both = [tokenizer(record[side])["input_ids"] for side in ("chosen", "rejected")]
            same = next((k for k, (a, b) in enumerate(zip(*both, strict=False)) if a != b), 0)
            if same >= BEFORE and min(map(len, both)) >= same + BEHIND:
                pairs.append([ids[same - BEFORE : same + BEHIND] for ids in both])
    return torch.tensor(pairs[: 2 * PAIRS])


def inputs_of_layers(model: Any, ids: Tensor) -> Tensor:
    """The hidden states before the trained layers, of sequences [sequences, tokens]."""
    found: list[Tensor] = []
    layer = model.model.layers[-LAYERS]
    hook = layer.register_forward_pre_hook(lambda _, arguments: found.append(arguments[0]))
    with torch.no_grad():
        model.model(ids)
    hook.remove()
    return found[0]


def margins(model: Any, hidden: Tensor, ids: Tensor) -> Tensor:
    """Log-prob of chosen less that of rejected, [pairs]."""
    places = torch.arange(ids.shape[1])[None]
    angles = model.model.rotary_emb(hidden, places)
    for layer in model.model.layers[-LAYERS:]:
        hidden = layer(hidden, position_ids=places, position_embeddings=angles)
    logits = model.lm_head(model.model.norm(hidden[:, BEFORE - 1 : -1])).float()
    logps = torch.log_softmax(logits, -1).gather(2, ids[:, BEFORE:, None]).sum((1, 2))
    return logps[0::2] - logps[1::2]


class Trial:
    """A model, its pairs, and the trained weights at the start."""

    def __init__(self, folder: str, pairs: str):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        self.ids = read_pairs(pairs, tokenizer).flatten(0, 1)
        self.models = {}
        self.hidden = {}
        self.reference = {}
        for dtype in (torch.float32, torch.bfloat16):
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).requires_grad_(False)
            self.models[dtype] = model
            self.hidden[dtype] = inputs_of_layers(model, self.ids)
            with torch.no_grad():
                self.reference[dtype] = margins(model, self.hidden[dtype], self.ids)
        trained = self.weights_of(torch.bfloat16)
        self.start = {name: weight.clone() for name, weight in trained.items()}
        assert len(self.ids) == 4 * PAIRS, "the file has too few pairs"

    def weights_of(self, dtype: torch.dtype) -> dict[str, Tensor]:
        layers = self.models[dtype].model.layers[-LAYERS:]
        return dict(layers.named_parameters())

    def losses(self, dtype: torch.dtype, pairs: range) -> Tensor:
        part = slice(2 * pairs.start, 2 * pairs.stop)
        margin = margins(self.models[dtype], self.hidden[dtype][part], self.ids[part])
        return -logsigmoid(BETA * (margin - self.reference[dtype][pairs.start : pairs.stop]))

    @torch.no_grad()
    def evaluate(self, values: dict[str, Tensor]) -> tuple[float, float, float]:
        for name, weight in self.weights_of(torch.float32).items():
            weight.copy_(values[name])
        held_out = self.losses(torch.float32, range(PAIRS, 2 * PAIRS))
        accuracy = (held_out < -logsigmoid(torch.zeros(()))).double().mean()
        seen = self.losses(torch.float32, range(PAIRS))
        return float(seen.double().mean()), float(held_out.double().mean()), float(accuracy)

    def way(self, values: dict[str, Tensor]) -> Tensor:
        """How far weights have moved, one vector."""
        moved = [(values[name].float() - weight.float()).view(-1) for name, weight in self.start.items()]
        return torch.cat(moved).double()

    def train(self, way: str, rate: float, steps: int, every: int) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """Yield the weights that the optimizer has after each `every` steps."""
        dtype = torch.float32 if way == "float32" else torch.bfloat16
        has_masters = way in ("masters", "forward by chance")
        in_bf16 = way in ("chance", "nearest")
        weights = self.weights_of(dtype)
        for name, weight in weights.items():
            weight.requires_grad_(False).copy_(self.start[name]).requires_grad_()
        held = weights
        if has_masters:
            held = {name: torch.nn.Parameter(weight.detach().float()) for name, weight in weights.items()}
        optimizer: Any = None
        if in_bf16:
            flats = {name: weight.detach().view(-1) for name, weight in weights.items()}
            optimizer = AdamWBF16([*flats.values()], rate, (0.9, 0.999), 1e-8, 0)
            whole = {name: torch.nn.Parameter(weight.detach()) for name, weight in weights.items()}
            optimizer.ranges = {flat: [(whole[name], 0, 0, flat.numel())] for name, flat in flats.items()}
            optimizer.names = {weight: name for name, weight in whole.items()}
        else:
            optimizer = torch.optim.AdamW(held.values(), rate, weight_decay=0.0)
        for step in range(steps):
            first = step * OF_A_STEP % PAIRS
            loss = self.losses(dtype, range(first, first + OF_A_STEP)).mean()
            gradients = torch.autograd.grad(loss, [*weights.values()])
            for name, gradient in zip(weights, gradients, strict=True):
                if in_bf16:
                    flats[name].grad = gradient.view(-1)
                else:
                    held[name].grad = gradient.to(held[name].dtype)
            with rounding_to_the_nearest() if way == "nearest" else contextlib.nullcontext():
                optimizer.step()
            if has_masters:
                with torch.no_grad():
                    for name, weight in weights.items():
                        exact = held[name].detach()
                        by_chance = way == "forward by chance"
                        weight.copy_(round_by_chance(exact, 0, "forward", name) if by_chance else exact)
            if (step + 1) % every == 0:
                values = {name: weight.detach().clone() for name, weight in held.items()}
                yield step + 1, values
                with torch.no_grad():
                    for name, weight in held.items():
                        weight.copy_(values[name])  # `evaluate` has written others in the float32 model


@contextlib.contextmanager
def rounding_to_the_nearest() -> Iterator[None]:
    """Make `adamw_bf16` round to the nearest."""
    by_chance = adamw_bf16.rounded
    adamw_bf16.rounded = lambda exact, bits: exact.bfloat16()  # noqa: ARG005
    yield
    adamw_bf16.rounded = by_chance


def models_of(way: str, values: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Weights of the models to evaluate, by a name for the figure."""
    if way == "chance":
        return {"adamw_bf16": values}
    if way == "nearest":
        return {"adamw_bf16 to the nearest": values}
    kind = {"masters": "float32 masters", "float32": "float32 throughout"}.get(way, f"float32 masters, {way}")
    by_chance = {name: round_by_chance(weight, 0, "save", name) for name, weight in values.items()}
    return {
        f"{kind}, its own weights": values,
        f"{kind}, in bf16 to the nearest": {name: weight.bfloat16() for name, weight in values.items()},
        f"{kind}, in bf16 by chance": by_chance,
    }


def draw(curves: dict[tuple[float, str], list[Point]], path: str) -> None:
    """Write the figure: for each rate how far the loss falls, and the way of the weights."""
    rates = sorted({rate for rate, _ in curves})
    figure, axes = plt.subplots(2, len(rates), figsize=(5.2 * len(rates), 6), sharex=True, squeeze=False)
    for column, rate in enumerate(rates):
        for (of, name), points in curves.items():
            if of != rate or name not in IN_FIGURE:
                continue
            steps = [0] + [point.step for point in points]
            style = IN_FIGURE[name]
            axes[0][column].plot(steps, [0.0] + [point.training for point in points], style, label=name)
            axes[1][column].plot(steps[1:], [point.share for point in points], style, label=name)
        axes[0][column].set_title(f"learning rate {rate:g}")
        axes[1][column].set_xlabel("step")
    axes[0][0].set_ylabel("training loss falls by")
    axes[1][0].set_ylabel("share of the way of the master weights")
    axes[0][0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    """Print a line for each way, each of its models, and each fifth of the steps; draw the figure."""
    folder, pairs, rates, steps = sys.argv[1], sys.argv[2], sys.argv[3].split(","), int(sys.argv[4])
    torch.set_num_threads(1)
    trial = Trial(folder, pairs)
    begin = trial.evaluate(trial.start)
    curves: dict[tuple[float, str], list[Point]] = {}
    for rate in map(float, rates):
        of_masters = {}
        for way in WAYS:
            for step, values in trial.train(way, rate, steps, steps // 5):
                if way == "masters":
                    of_masters[step] = trial.way(values)
                for name, found in models_of(way, values).items():
                    seen, held_out, accuracy = trial.evaluate(found)
                    moved = sum(int((found[key] != weight).sum()) for key, weight in trial.start.items())
                    share = moved / sum(weight.numel() for weight in trial.start.values())
                    gone = trial.way(found) @ of_masters[step] / of_masters[step].square().sum()
                    point = Point(step, begin[0] - seen, begin[1] - held_out, float(gone))
                    curves.setdefault((rate, name), []).append(point)
                    falls = f"loss of training pairs falls by {point.training:.5f}, of held-out ones by "
                    falls += f"{point.held_out:.5f} (accuracy {accuracy:.3f}), weights changed: "
                    falls += f"{100 * share:.1f} %, share of the way: {point.share:.3f}"
                    print(f"{rate:g}, step {step}, {name}: {falls}", flush=True)
    if len(sys.argv) > 5:
        draw(curves, sys.argv[5])


if __name__ == "__main__":
    main()
