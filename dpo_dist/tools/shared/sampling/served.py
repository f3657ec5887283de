"""Generate by an OpenAI-compatible server, and check first that it serves our weights: log-probs tell.

In fp32, ours differ from those of a server in bf16 as they differ from our own in bf16, on the same tokens.
Other weights differ more: an int8 copy twice as much, a few steps of LoRA three times and more.
"""

import contextlib
import shlex
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

import numpy as np
import torch

from dpo_dist.batching.example import Example, TokenIds
from dpo_dist.config.schema import Dtype, ModelConfig
from dpo_dist.config.verb_sections import ServerConfig
from dpo_dist.data.records import PreferenceRecord
from dpo_dist.distributed.memory import return_memory
from dpo_dist.foundation.errors import ConfigError, first_line
from dpo_dist.foundation.text import pluralize
from dpo_dist.model.packed import packed_logps
from dpo_dist.tools.shared.sampling.client import Client, RefusedError
from dpo_dist.tools.shared.sampling.generate import Request, Sample
from dpo_dist.tools.shared.sampling.respond import (
    Responder,
    load_packed_source,
    usable_prompt,
)
from dpo_dist.tools.shared.sampling.settings import Sampling

_URL = "sampling.endpoint.url"
_SECONDS = 600.0  # for one request, also if it waits for others
RELOAD_SECONDS = 1800.0
"""For the command `sampling.endpoint.reload` and the start of the server."""
_CHECKED, _CHECK_TOKENS = 24, 64  # responses of a check, and the most tokens of each
_CHECK_BUDGET = 8192  # tokens of a micro-batch
_MOST = 1.5
"""Most that a server's log-probs differ from ours, as a multiple of what bf16 rounding makes."""


class _Form(StrEnum):
    """What a server understands, the best form first."""

    ids = "prompts as token ids"
    text = "prompts as texts"
    plain = "prompts as texts, one response at a time, no log-probs"  # `transformers serve`

    @property
    def samples(self) -> int:
        """The most responses that a harmless request asks for."""
        return 1 if self is _Form.plain else 2


@dataclass(frozen=True)
class _Completed:
    """A response, with the log-probs of its tokens and its end (empty: not reported).

    `prompt`: how the server read the prompt: its ids, or only their number; None: not reported.
    """

    sample: Sample
    text: str
    logps: list[float]
    prompt: list[int] | int | None


@dataclass(frozen=True, eq=False)
class Server:
    """A model behind a server; `responder` knows its tokens."""

    client: Client
    responder: Responder
    form: _Form = _Form.ids

    def __str__(self) -> str:
        return f"{self.client.name} at {self.client.url}: {self.form}"

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Sample | None]:
        """Return a sample for each request, in order; None where the server refuses the prompt."""
        prompts: dict[str, list[Request]] = {}
        for request in requests:
            own = f" {request.number}" if self.form is _Form.plain else ""
            prompts.setdefault(request.key + own, []).append(request)

        def answer(group: list[Request]) -> list[tuple[list[int], int | None]]:
            completed = self.complete(group[0].prompt_ids, sampling, len(group))
            return [(each.sample.ids, each.sample.end) for each in completed]

        replies, samples = self.client.ask(prompts, answer, self.check), dict[Request, Sample | None]()
        for key, group in prompts.items():
            drawn = replies[key]
            samples |= zip(
                group,
                [None] * len(group) if drawn is None else [Sample(*each) for each in drawn],
                strict=True,
            )
        return [samples[request] for request in requests]

    def complete(self, prompt_ids: TokenIds, sampling: Sampling, count: int) -> list[_Completed]:
        """Return `count` responses to a prompt; raise RefusedError if the server refuses it."""
        prompt = prompt_ids.tolist() if self.form is _Form.ids else self._as_text(prompt_ids)
        body = {
            "model": self.client.name,
            "prompt": prompt,
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
        }
        if self.form is not _Form.plain:
            # Else the defaults of the model's folder, such as a repetition penalty, would count.
            plain = {"top_k": sampling.top_k or -1, "min_p": 0.0, "repetition_penalty": 1.0}
            ids = {"stop_token_ids": sorted(self.responder.stop_ids), "return_token_ids": True}
            body |= {"n": count, "logprobs": 1, "extra_body": plain | ids}
        elif sampling.top_k:
            body["extra_body"] = {"top_k": sampling.top_k}
        reply: Any = self.client.send(lambda openai: openai.completions.create(**body))
        choices = getattr(reply, "choices", None) or []
        if len(choices) != count:
            raise RefusedError(f"{len(choices)} of {pluralize(count, 'response')}")
        read = getattr(getattr(reply, "usage", None), "prompt_tokens", None)
        return [self._completed(prompt_ids.tolist(), choice, read) for choice in choices]

    def _completed(self, prompt_ids: list[int], choice: Any, read: int | None) -> _Completed:
        stop_ids, ids = self.responder.stop_ids, getattr(choice, "token_ids", None)
        if ids is None:  # tokenized after the prompt, by which the first token can differ
            before = self._as_text(prompt_ids)
            whole = self._encoded(before + choice.text)
            is_same = whole[: len(prompt_ids)] == prompt_ids
            ids = (
                whole[len(prompt_ids) :] if is_same else self._encoded(choice.text, add_special_tokens=False)
            )
        sample = Sample.from_tokens(ids, stop_ids)
        if choice.finish_reason == "stop" and not sample.is_finished:
            own = self.responder.tokenizer.eos_token_id
            sample = replace(sample, end=own if own in stop_ids else min(stop_ids))
        logps = getattr(choice.logprobs, "token_logprobs", None) or []
        echo = getattr(choice, "prompt_token_ids", None) or read
        return _Completed(sample, choice.text, logps, echo)

    def _encoded(self, text: str, **options: Any) -> list[int]:
        return list(self.responder.tokenizer(text, **options)["input_ids"])

    def _as_text(self, prompt_ids: TokenIds | list[int]) -> str:
        """Return the text that the server will tokenize to these ids; raise RefusedError without one."""
        tokenizer, ids = self.responder.tokenizer, list(map(int, prompt_ids))
        text = str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
        for written in (text, text.removeprefix(str(tokenizer.bos_token))):
            if self._encoded(written) == ids:
                return written
        raise RefusedError("the prompt as a text has other tokens")

    def probe(self) -> None:
        """Send a harmless request; raise RefusedError or ConfigError if the server cannot answer it."""
        self.complete(np.array(self._encoded("Hello."), dtype=np.int32), Sampling(1), self.form.samples)

    def check(self) -> None:
        """Raise ConfigError if the server refuses a harmless request, too."""
        try:
            self.probe()
        except RefusedError as refusal:
            raise self.client.unusable(f"{refusal}, also for a harmless request") from None


def _address(endpoint: ServerConfig, responder: Responder) -> tuple[str, str, str]:
    return str(endpoint.url), _URL, endpoint.model or responder.source.name


def open_server(endpoint: ServerConfig, responder: Responder) -> Server:
    """Return the server of a model in the first form in which it answers a harmless request.

    The responder's limit on prompt and response becomes the server's, if that is lower.
    """
    client = Client(*_address(endpoint, responder), _SECONDS, endpoint.parallel)
    limits = (responder.longest, getattr(client.listed().get(client.name), "max_model_len", None))
    longest = min((limit for limit in limits if limit is not None), default=None)
    server = Server(client, replace(responder, longest=longest))
    for form in _Form:
        server = replace(server, form=form)
        with contextlib.suppress(RefusedError):
            server.probe()
            return server
    server.check()
    return server


def reload_server(endpoint: ServerConfig, responder: Responder) -> None:
    """Run `sampling.endpoint.reload`, and wait until the server answers."""
    folder = str((responder.source.adapter or responder.source.folder).absolute())
    deadline = time.monotonic() + RELOAD_SECONDS
    try:
        words = [word.replace("{model}", folder) for word in shlex.split(str(endpoint.reload))]
        subprocess.run(words, check=True, timeout=RELOAD_SECONDS, stdin=subprocess.DEVNULL)  # noqa: S603
    except (OSError, ValueError, subprocess.SubprocessError) as fault:
        raise ConfigError(
            "the command that changes the server's weights failed",
            where="sampling.endpoint.reload",
            got=first_line(fault),
            expected="exit code 0 once the old weights are gone; a server is started in the background",
            remedy="correct the command, whose output is in logs/rank-0.log of the run directory",
        ) from None
    while True:
        try:
            Client(*_address(endpoint, responder), _SECONDS, 1, retries=0).listed()
        except ConfigError:
            if time.monotonic() > deadline:
                raise
            time.sleep(1)
        else:
            return


def check_served(
    server: Server, records: Sequence[PreferenceRecord], model: ModelConfig, device: torch.device
) -> str:
    """Return how log-probs of the server's responses differ from ours; raise ConfigError if by too much."""
    asked = [usable_prompt(record, server.responder, _CHECK_TOKENS) for record in records[:_CHECKED]]
    prompts = [prompt.prompt_ids for prompt in asked if not isinstance(prompt, str)]
    if not prompts:
        return f"{server}: unchecked, for no prompt can be asked"
    numbered = {str(number): prompts[number % len(prompts)] for number in range(_CHECKED)}
    replies = server.client.ask(
        numbered, lambda ids: server.complete(ids, Sampling(_CHECK_TOKENS), 1)[0], server.check
    )
    answered = [(ids, reply) for number, ids in numbered.items() if (reply := replies[number]) is not None]
    _check_tokens(server, answered)
    examples, theirs = [], list[float]()
    for ids, reply in answered:
        ends = [] if reply.sample.end is None else [reply.sample.end]
        tokens = (reply.sample.ids + ends)[: len(reply.logps)]
        if tokens and len(reply.logps) in (len(reply.sample.ids), len(reply.sample.ids + ends)):
            examples.append(Example(ids, (np.array(tokens, dtype=np.int32),)))
            theirs += reply.logps
    if not theirs:
        return f"warning: {server}: unchecked, because the server gives no log-probs that belong to tokens"
    exact, rounded = (
        _logps(server, examples, replace(model, dtype=dtype), device) for dtype in (Dtype.fp32, Dtype.bf16)
    )
    differences, rounding = exact - np.array(theirs), float(np.abs(exact - rounded).mean())
    size, mean = float(np.abs(differences).mean()), float(differences.mean())
    said = (
        f"log-probs of {len(theirs):,} tokens differ from ours by {size:.4f} on average "
        f"(mean difference {mean:+.4f}); bf16 rounding makes {rounding:.4f}"
    )
    if size <= _MOST * rounding:
        return f"{server}: {said}"
    # Rounding and quantisation err in both directions; other weights find the server's responses less likely.
    cause = "other weights, such as those of an earlier round, or gets other prompts"
    if mean > -(size**2):
        cause = "a quantised copy of them"
    raise _other(server, said, f"at most {_MOST * rounding:.4f}", f"it probably serves {cause}")


def _check_tokens(server: Server, answered: Sequence[tuple[TokenIds, _Completed]]) -> None:
    """Check that the server reads our prompts, and that its tokens have our texts."""
    tokenizer, count = server.responder.tokenizer, len(answered)
    other = [
        (ids, reply.prompt) for ids, reply in answered if reply.prompt not in (None, len(ids), ids.tolist())
    ]
    if other:
        ids, read = other[0]
        got = f"{read if isinstance(read, int) else len(read or ())} tokens of a prompt of {len(ids)}"
        raise _other(
            server,
            f"{got}; {len(other)} of {pluralize(count, 'prompt')} differ",
            "the prompts as they were sent",
            "it applies a chat template, drops a system prompt or adds tokens, or has another tokenizer",
        )
    read_again = [
        (str(tokenizer.decode(each.sample.ids, skip_special_tokens=True)), each.text) for _, each in answered
    ]
    wrong = sum(ours.split() != theirs.split() for ours, theirs in read_again)
    if wrong > count / 2:
        got = f"{wrong} of {pluralize(count, 'response')} whose tokens have other texts here"
        raise _other(server, got, "the tokens of our tokenizer", "it has another tokenizer")


def _other(server: Server, got: str, expected: str, cause: str) -> ConfigError:
    source = server.responder.source
    return ConfigError(
        "the server does not serve the model that should respond",
        where=_URL,
        got=f"{server}: {got}",
        expected=expected,
        remedy=f"{cause}: start it with {source.adapter or source.folder}, or set sampling.endpoint.reload; "
        "the same command continues",
    )


@torch.inference_mode()
def _logps(server: Server, examples: Sequence[Example], model: ModelConfig, device: torch.device) -> Any:
    """Return our log-probs, float64 [tokens]; the model is freed."""
    longest = max(len(example.prompt_ids) for example in examples) + _CHECK_TOKENS + 1
    packed = load_packed_source(server.responder.source, model, longest, device)
    logps = packed_logps(packed, examples, _CHECK_BUDGET)
    del packed
    return_memory()
    return torch.cat(logps).cpu().double().numpy()
