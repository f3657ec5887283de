"""A completions server on this machine: transformers generates, with token ids and log-probs as vLLM's."""

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.support.http_server import http_server

STRICT = {"model", "prompt", "max_tokens", "temperature", "top_p"}
"""The fields that `transformers serve` accepts."""


@dataclass
class CompletionsServer:
    """What is served, and the requests that came in; a test may change everything while it runs."""

    folder: Path
    name: str = "policy"
    form: str = "ids"  # in and out, "text" out only, or "plain": text in and out, and nothing else
    longest: int | None = None
    seconds: float = 0.0  # before each reply
    reads: Callable[[list[int]], list[int]] = list  # the prompt that the model gets
    confesses: bool = True  # whether the reply says so
    refuses: Callable[[list[int]], bool] = lambda _: False
    changes: Callable[[Any], None] = lambda _: None  # the model, when it is loaded
    url: str = ""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)
    others: dict[str, Path] = field(default_factory=dict)  # further models by name
    loaded: dict[Path, tuple[Any, Any]] = field(default_factory=dict)

    def load(self, name: str) -> tuple[Any, Any]:
        folder = self.others.get(name, self.folder)
        if folder not in self.loaded:
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
            self.changes(model)
            self.loaded[folder] = model, AutoTokenizer.from_pretrained(folder)
        return self.loaded[folder]

    def models(self) -> dict[str, Any]:
        return {
            "object": "list",
            "data": [{"id": self.name, "object": "model", "max_model_len": self.longest}],
        }

    def complete(self, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        if body["model"] not in (self.name, *self.others):
            return 404, {"error": {"code": "model_not_found", "message": ""}}
        if self.form == "plain" and not body.keys() <= STRICT:
            return 422, {"error": {"code": None, "message": "a text of the request"}}
        if self.form == "plain" and not isinstance(body["prompt"], str):
            return 400, {"error": {"code": None, "message": "prompt must be a string"}}
        with self.lock:
            model, tokenizer = self.load(body["model"])
            sent = tokenizer(body["prompt"])["input_ids"] if self.form == "plain" else body["prompt"]
            if self.refuses(sent):
                return 400, {"error": {"code": "filter", "message": "a text of the request"}}
            prompt = self.reads(sent)
            choices = [self.choice(model, tokenizer, prompt, sent, body) for _ in range(body.get("n", 1))]
        usage = {
            "prompt_tokens": len(prompt if self.confesses else sent),
            "completion_tokens": 0,
            "total_tokens": 0,
        }
        return 200, {
            "id": "1",
            "object": "text_completion",
            "model": self.name,
            "choices": choices,
            "usage": usage,
        }

    def choice(
        self, model: Any, tokenizer: Any, prompt: list[int], sent: list[int], body: dict[str, Any]
    ) -> Any:
        ids, logps = list[int](), list[float]()
        stops = {tokenizer.eos_token_id, *body.get("stop_token_ids", [])}
        with torch.inference_mode():
            for _ in range(body["max_tokens"]):
                logits = model(torch.tensor([prompt + ids])).logits[0, -1].float().log_softmax(-1)
                drawn = (
                    (logits / body["temperature"]).exp().multinomial(1)
                    if body["temperature"]
                    else logits.argmax()
                )
                ids.append(int(drawn))
                logps.append(float(logits[ids[-1]]))
                if ids[-1] in stops:
                    break
        ended = ids[-1] in stops
        choice: dict[str, Any] = {"index": 0, "finish_reason": "stop" if ended else "length"}
        choice["text"] = tokenizer.decode(ids[: len(ids) - ended], skip_special_tokens=True)
        choice["logprobs"] = None if self.form == "plain" else {"token_logprobs": logps}
        if body.get("return_token_ids") and self.form == "ids":
            choice |= {"token_ids": ids, "prompt_token_ids": prompt if self.confesses else sent}
        return choice


@contextlib.contextmanager
def completions_server(served: CompletionsServer) -> Iterator[CompletionsServer]:
    """Serve until the end of the block."""

    def respond(path: str, body: Any, _headers: Mapping[str, str]) -> tuple[int, str]:
        if body is None:
            return 200, json.dumps(served.models())
        if path == "/reload":
            served.folder = Path(body["model"])
            return 200, "{}"
        time.sleep(served.seconds)
        status, content = served.complete(body)
        served.bodies.append(body)
        return status, json.dumps(content)

    with http_server(respond) as address:
        served.url = f"{address}/v1"
        yield served


def to_int8(model: Any) -> None:
    """Round the weights of a model to 8 bits, by rows."""
    for name, weight in model.named_parameters():
        if weight.ndim == 2 and "embed" not in name:
            scale = weight.data.abs().amax(1, keepdim=True) / 127
            weight.data = (weight.data / scale).round() * scale
