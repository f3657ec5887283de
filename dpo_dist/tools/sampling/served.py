"""Generate by an OpenAI-compatible server, and check first that it serves our weights: log-probs tell.

Those of a server in bf16 differ from ours, computed in fp32 with its weights, as our own in bf16 do.
Other weights differ more: an int8 copy twice as much, a few steps of LoRA three times and more.
"""

import contextlib
import math
import shlex
import subprocess
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from dpo_dist.data import Example, PreferenceRecord, TokenIds
from dpo_dist.foundation.console import Console
from dpo_dist.foundation.errors import ConfigError
from dpo_dist.foundation.text import pluralize, without_secrets
from dpo_dist.kit import Dtype, ModelConfig, ModelSource, packed_logps, return_memory
from dpo_dist.tools.sampling.client import Choice, Client, CompletionReply, RefusedError
from dpo_dist.tools.sampling.generate import Request, Sample
from dpo_dist.tools.sampling.keys import ServerConfig
from dpo_dist.tools.sampling.respond import Responder, usable_prompt
from dpo_dist.tools.sampling.settings import Sampling

_URL = "sampling.endpoint.url"
_SECONDS = 600.0  # for one request, also if it waits for others
RELOAD_SECONDS = 1800.0
"""For the command `sampling.endpoint.reload` and the start of the server."""
CHECKED = 24
"""Responses of a check."""
CHECK_TOKENS = 64
"""The most tokens of each."""
_CHECK_BUDGET = 8192  # tokens of a micro-batch
_MOST = 1.6
"""Most that a server's log-probs differ from ours, as a multiple of what bf16 rounding makes."""
_STANDARD_ERRORS = 3.0  # of that, if the responses are short


@dataclass(frozen=True)
class _Completed:
    """A response; `logps` are those of its tokens and its end (empty: not reported).

    `prompt`: how the server read the prompt: its ids, or only their number; None: not reported.
    """

    sample: Sample
    text: str
    logps: list[float]
    prompt: list[int] | int | None


@dataclass(frozen=True, eq=False)
class Server:
    """A model behind a server; `responder` knows its tokens.

    A server that `takes_ids` also makes several responses at a time; `transformers serve` does neither.
    """

    client: Client
    responder: Responder
    takes_ids: bool = True

    def __str__(self) -> str:
        form = "token ids" if self.takes_ids else "texts, one response at a time, no log-probs"
        return f"{self.client.name} at {self.client.url} gets prompts as {form}"

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Sample | None]:
        """Return a sample for each request, in order; None where the server refuses the prompt."""
        keys = [f"{each.key} {'' if self.takes_ids else each.number}" for each in requests]
        counts = Counter(keys)
        prompts = dict(zip(keys, requests, strict=True))

        def answer(key: str) -> list[tuple[list[int], int | None]]:
            most = replace(sampling, max_new_tokens=prompts[key].new_tokens(sampling))
            completed = self.complete(prompts[key].prompt_ids, most, counts[key])
            return [(each.sample.ids, each.sample.end) for each in completed]

        replies = self.client.ask(prompts, answer, self.probe)
        responses = {key: iter(reply or ()) for key, reply in replies.items()}
        samples = list[Sample | None]()
        for key in keys:
            response = next(responses[key], None)
            samples.append(None if response is None else Sample(*response))
        return samples

    def complete(self, prompt_ids: TokenIds, sampling: Sampling, count: int) -> list[_Completed]:
        """Return `count` responses to a prompt; raise RefusedError if the server refuses it."""
        extra: dict[str, Any] = {}
        if sampling.top_k:
            extra["top_k"] = sampling.top_k
        body: dict[str, Any] = {
            "model": self.client.name,
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "prompt": prompt_ids.tolist() if self.takes_ids else self._as_text(prompt_ids),
            "extra_body": extra,
        }
        if self.takes_ids:
            body |= {"n": count, "logprobs": 1}
            # Else the defaults of the model's folder, such as a repetition penalty, would count.
            extra |= {
                "top_k": sampling.top_k or -1,
                "min_p": 0.0,
                "repetition_penalty": 1.0,
                "stop_token_ids": sorted(self.responder.stop_ids),
                "return_token_ids": True,
            }
        reply = self.client.send(
            lambda openai: openai.completions.with_raw_response.create(**body), CompletionReply
        )
        if len(reply.choices) != count:
            raise RefusedError(f"{len(reply.choices)} of {pluralize(count, 'response')}")
        prompt_tokens = reply.usage.prompt_tokens if reply.usage else None
        # Reported tokens are tokens of the model, as many as their log-probs and not too many.
        most = sampling.max_new_tokens
        end = self.responder.vocabulary
        for choice in reply.choices:
            ids = choice.token_ids or []
            logps = (choice.logprobs and choice.logprobs.token_logprobs) or []
            if end is not None and max(ids, default=0) >= end:
                raise self.client.unusable(f"the token {max(ids)} of a model with {end:,} tokens")
            if len(ids) > most:
                raise self.client.unusable(f"{pluralize(len(ids), 'token')}, though it was asked for {most}")
            if ids and logps and len(logps) != len(ids):
                raise self.client.unusable(f"{len(logps)} log-probs of {pluralize(len(ids), 'token')}")
        return [self._completed(prompt_ids, choice, prompt_tokens) for choice in reply.choices]

    def _completed(self, prompt_ids: TokenIds, choice: Choice, prompt_tokens: int | None) -> _Completed:
        stop_ids = self.responder.stop_ids
        ids = choice.token_ids
        text = choice.text or ""
        if ids is None:  # tokenized after the prompt, on which the first token may depend
            ids = self._encoded(self._as_text(prompt_ids) + text)
            is_after = ids[: len(prompt_ids)] == prompt_ids.tolist()
            ids = ids[len(prompt_ids) :] if is_after else self._encoded(text, add_special_tokens=False)
        sample = Sample.from_tokens(ids, stop_ids)
        if choice.finish_reason == "stop" and not sample.is_finished:
            eos = self.responder.tokenizer.eos_token_id
            sample = replace(sample, end=eos if eos in stop_ids else min(stop_ids))
        reported = (choice.logprobs and choice.logprobs.token_logprobs) or []
        logps = [logp for logp in reported if logp is not None]
        if len(logps) < len(reported):
            logps = []
        prompt = choice.prompt_token_ids or prompt_tokens or None  # 0: it does not count them
        return _Completed(sample, text, logps, prompt)

    def _encoded(self, text: str, **options: Any) -> list[int]:
        return list(self.responder.tokenizer(text, **options)["input_ids"])

    def _as_text(self, prompt_ids: TokenIds) -> str:
        """Return the text that the server will tokenize to these ids; raise RefusedError without one."""
        tokenizer = self.responder.tokenizer
        ids = prompt_ids.tolist()
        text = str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
        for candidate in (text, text.removeprefix(str(tokenizer.bos_token))):
            if self._encoded(candidate) == ids:
                return candidate
        raise RefusedError("the prompt as a text has other tokens")

    def probe(self) -> None:
        """Send a harmless request; raise RefusedError or ConfigError if the server cannot answer it."""
        ids = np.array(self._encoded("Hello."), dtype=np.int32)
        self.complete(ids, Sampling(1), 2 if self.takes_ids else 1)


def open_server(endpoint: ServerConfig, responder: Responder) -> Server:
    """Return the server of a model, after a harmless request that says what it takes.

    The responder's limit on prompt and response becomes the server's, if that is lower.
    """
    name = endpoint.model or responder.source.name
    client = Client(str(endpoint.url), _URL, name, _SECONDS, endpoint.parallel)
    limits = (responder.longest, client.listed().get(name))
    longest = min((limit for limit in limits if limit is not None), default=None)
    server = Server(client, replace(responder, longest=longest))
    try:
        server.probe()
    except RefusedError:
        server = replace(server, takes_ids=False)
        client.check(server.probe)
    return server


def reload_server(endpoint: ServerConfig, source: ModelSource) -> None:
    """Run `sampling.endpoint.reload`, and wait until the server answers."""
    folder = str((source.adapter or source.folder).absolute())
    deadline = time.monotonic() + RELOAD_SECONDS
    try:
        words = [word.replace("{model}", folder) for word in shlex.split(str(endpoint.reload))]
        subprocess.run(words, check=True, timeout=RELOAD_SECONDS, stdin=subprocess.DEVNULL)  # noqa: S603
    except (OSError, ValueError, subprocess.SubprocessError) as fault:
        raise ConfigError(
            "the command that changes the server's weights failed",
            where="sampling.endpoint.reload",
            got=f"{type(fault).__name__}: {without_secrets(str(fault))[:200]}",  # hidden before it is cut
            expected="exit code 0 once the old weights are gone; a server is started in the background",
            remedy="correct the command, whose output is in logs/rank-0.log of the run directory",
        ) from None
    client = Client(str(endpoint.url), _URL, endpoint.model or source.name, _SECONDS, 1)
    while time.monotonic() < deadline:
        with contextlib.suppress(ConfigError):
            client.listed()
            return
        time.sleep(1)


def check_served(
    server: Server,
    records: Sequence[PreferenceRecord],
    model: ModelConfig,
    device: torch.device,
    console: Console,
) -> None:
    """Print how log-probs of the server's responses differ from ours; raise ConfigError if by too much."""
    short = Sampling(CHECK_TOKENS, is_default=True)
    usable = list[TokenIds]()
    for record in records[:CHECKED]:
        prompt = usable_prompt(record, server.responder, short)
        if not isinstance(prompt, str):
            usable.append(prompt.prompt_ids)
    prompts = {str(number): usable[number % len(usable)] for number in range(CHECKED if usable else 0)}

    def answer(number: str) -> _Completed:
        ids = prompts[number]
        return server.complete(ids, Sampling(short.room(len(ids), server.responder.longest)), 1)[0]

    replies = server.client.ask(prompts, answer, server.probe)
    answers = [(prompts[number], reply) for number, reply in replies.items() if reply is not None]
    _check_tokens(server, answers)
    examples = []
    theirs = list[float]()
    for ids, reply in answers:
        tokens = list(reply.sample.ids)
        if reply.sample.end is not None:
            tokens.append(reply.sample.end)
        tokens = tokens[: len(reply.logps)]
        if tokens and len(tokens) == len(reply.logps) >= len(reply.sample.ids):
            examples.append(Example(ids, (np.array(tokens, dtype=np.int32),)))
            theirs += reply.logps
    if not theirs:
        console.warn(f"{server}: unchecked, because there are no log-probs to compare")
        return
    # The server has the folder's weights, also where training quantises them.
    in_fp32 = replace(model, quantization=None, dtype=Dtype.fp32)
    in_bf16 = replace(in_fp32, dtype=Dtype.bf16)
    exact, of_rounded_weights = _logps(server, examples, in_fp32, device, (torch.float32, torch.bfloat16))
    [rounded] = _logps(server, examples, in_bf16, device, (torch.bfloat16,))
    # A server has the weights in float32 or in bf16, and computes in either.
    both = [ours - np.array(theirs) for ours in (exact, of_rounded_weights)]
    differences = min(both, key=lambda each: float(np.abs(each).mean()))
    size = float(np.abs(differences).mean())
    mean = float(differences.mean())
    by_rounding = np.abs(of_rounded_weights - rounded)
    rounding = float(by_rounding.mean())
    most = most_difference(by_rounding)
    result = (
        f"log-probs of {len(theirs):,} tokens differ from ours by {size:.4f} on average "
        f"(mean difference {mean:+.4f}); bf16 rounding makes {rounding:.4f}"
    )
    if size <= most:
        console.say(f"{server}: {result}")
        return
    cause = "other weights, such as an earlier round's, or other prompts"
    if size < 5 * rounding:  # 8 bits make 2.4 times what bf16 makes
        cause = "a quantised copy, or weights of a few steps before"
    raise _other(server, result, f"at most {most:.4f}", f"it probably serves {cause}")


def most_difference(by_rounding: npt.NDArray[np.float64]) -> float:
    """Return the most that a server's log-probs of these tokens may differ from ours on average."""
    standard_error = float(by_rounding.std()) / math.sqrt(len(by_rounding))
    mean = float(by_rounding.mean())
    return _MOST * (mean + _STANDARD_ERRORS * standard_error)


def _check_tokens(server: Server, answers: Sequence[tuple[TokenIds, _Completed]]) -> None:
    """Check that the server reads our prompts, and that its tokens have our texts."""
    for ids, reply in answers:
        if reply.prompt not in (None, len(ids), ids.tolist()):
            count = reply.prompt if isinstance(reply.prompt, int) else len(reply.prompt or ())
            cause = "it applies a chat template, drops a system prompt, or has another tokenizer"
            raise _other(server, f"it reads {count} tokens", f"the {len(ids)} tokens of a prompt", cause)
    decode = partial(server.responder.tokenizer.decode, skip_special_tokens=True)
    wrong = sum(str(decode(each.sample.ids)).split() != each.text.split() for _, each in answers)
    if wrong > len(answers) / 2:
        got = f"{wrong} of {pluralize(len(answers), 'response')} have other texts here"
        raise _other(server, got, "the tokens of our tokenizer", "it has another tokenizer")


def _other(server: Server, got: str, expected: str, cause: str) -> ConfigError:
    source = server.responder.source
    return ConfigError(
        "the server does not serve the model that should respond",
        where=_URL,
        got=f"{server}: {got}",
        expected=expected,
        remedy=f"{cause}: start it with {source.adapter or source.folder}, by hand or by "
        "sampling.endpoint.reload; the same command continues",
    )


@torch.inference_mode()
def _logps(
    server: Server,
    examples: Sequence[Example],
    model: ModelConfig,
    device: torch.device,
    weight_dtypes: Sequence[torch.dtype],
) -> list[npt.NDArray[np.float64]]:
    """Return our log-probs, [tokens], by weights rounded to each dtype in turn; the model is freed."""
    longest = max(len(example.prompt_ids) for example in examples) + CHECK_TOKENS + 1
    packed = server.responder.source.load_packed(model, longest, device)
    logps_of_dtypes = []
    for dtype in weight_dtypes:
        for weight in packed.parameters():
            weight.data = weight.data.to(dtype).to(weight.dtype)
        logps = torch.cat(packed_logps(packed, examples, _CHECK_BUDGET))
        logps_of_dtypes.append(logps.cpu().double().numpy())
    del packed
    return_memory()
    return logps_of_dtypes
