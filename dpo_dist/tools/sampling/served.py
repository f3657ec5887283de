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
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from dpo_dist.data import Example, PreferenceRecord, TokenIds
from dpo_dist.foundation.console import Console
from dpo_dist.foundation.errors import ConfigError
from dpo_dist.foundation.text import pluralize, without_secrets
from dpo_dist.kit import Dtype, ModelConfig, ModelSource, packed_logps, return_memory
from dpo_dist.tools.sampling.client import Client, RefusedError
from dpo_dist.tools.sampling.generate import Request, Sample
from dpo_dist.tools.sampling.keys import ServerConfig
from dpo_dist.tools.sampling.respond import Responder, usable_prompt
from dpo_dist.tools.sampling.settings import Sampling

if TYPE_CHECKING:
    from openai.types import Completion

_URL = "sampling.endpoint.url"
_SECONDS = 600.0  # for one request, also if it waits for others
RELOAD_SECONDS = 1800.0
"""For the command `sampling.endpoint.reload` and the start of the server."""
CHECKED = 24
"""Responses of a check."""
CHECK_TOKENS = 64
"""The most tokens of each."""
_CHECK_BUDGET = 8192  # tokens of a micro-batch
_MOST_IDS = 2**31
_MOST = 1.6
"""Most that a server's log-probs differ from ours, as a multiple of what bf16 rounding makes."""
_STANDARD_ERRORS = 3.0  # of that, if the responses are short


@dataclass(frozen=True)
class _Answer:
    """A response; `logps` are those of its tokens and its end (empty: not reported).

    `prompt_tokens`: how many tokens the server read as the prompt; None or 0: not reported.
    """

    sample: Sample
    logps: list[float]
    prompt_tokens: int | None


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
            answers = self.complete(prompts[key].prompt_ids, most, counts[key])
            return [(each.sample.ids, each.sample.end) for each in answers]

        replies = self.client.ask(prompts, answer, self.probe)
        responses = {key: iter(reply or ()) for key, reply in replies.items()}
        samples = list[Sample | None]()
        for key in keys:
            response = next(responses[key], None)
            samples.append(None if response is None else Sample(*response))
        return samples

    def complete(self, prompt_ids: TokenIds, sampling: Sampling, count: int) -> list[_Answer]:
        """Return `count` responses to a prompt; raise RefusedError if the server refuses it."""
        extra: dict[str, Any] = {}
        if sampling.top_k:
            extra["top_k"] = sampling.top_k
        body: dict[str, Any] = {
            "model": self.client.name,
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "extra_body": extra,
        }
        if not self.takes_ids:
            body["prompt"] = self._as_text(prompt_ids)
        else:
            body |= {"prompt": prompt_ids.tolist(), "n": count, "logprobs": 1}
            # Else the defaults of the model's folder, such as a repetition penalty, would count.
            extra |= {
                "top_k": sampling.top_k or -1,
                "min_p": 0.0,
                "repetition_penalty": 1.0,
                "stop_token_ids": sorted(self.responder.stop_ids),
                "return_token_ids": True,
            }
        return self.client.send(
            lambda openai: openai.completions.create(**body),
            lambda reply: self._answers(prompt_ids, reply, count),
        )

    def _answers(self, prompt_ids: TokenIds, reply: "Completion", count: int) -> list[_Answer]:
        """Return the responses of a reply; raise ConfigError if their tokens are none of the model's."""
        if len(reply.choices) != count:
            raise RefusedError(f"{len(reply.choices)} of {pluralize(count, 'response')}")
        stop_ids = self.responder.stop_ids
        vocabulary = self.responder.vocabulary or _MOST_IDS
        prompt_tokens = reply.usage.prompt_tokens if reply.usage else None
        answers = []
        for choice in reply.choices:
            ids: list[int] | None = getattr(choice, "token_ids", None)
            logps = (choice.logprobs and choice.logprobs.token_logprobs) or []
            if None in logps:
                logps = []
            for token in ids or ():
                if type(token) is not int or not 0 <= token < vocabulary:
                    raise self.client.unusable(f"a token that is none of the model's {vocabulary:,}")
            # Rounding lifts the log-prob of a certain token a little above 0.
            if not all(-math.inf < logp <= 1e-3 for logp in logps):
                raise self.client.unusable("a log-prob that is not finite, or above 0")
            if ids is None:
                ids = self._ids_after(prompt_ids, choice.text or "")
            sample = Sample.from_tokens(ids, stop_ids)
            if choice.finish_reason == "stop" and not sample.is_finished:
                eos = self.responder.tokenizer.eos_token_id
                end = eos if eos in stop_ids else min(stop_ids)
                sample = replace(sample, end=end)
            answers.append(_Answer(sample, logps, prompt_tokens))
        return answers

    def _ids_after(self, prompt_ids: TokenIds, text: str) -> list[int]:
        """Return the tokens of a response, whose first one may depend on its prompt."""
        ids = self._encoded(self._as_text(prompt_ids) + text)
        if ids[: len(prompt_ids)] == prompt_ids.tolist():
            return ids[len(prompt_ids) :]
        return self._encoded(text, add_special_tokens=False)

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
    prompts = dict[str, TokenIds]()
    for record in records[:CHECKED]:
        prompt = usable_prompt(record, server.responder, short)
        if not isinstance(prompt, str):
            prompts[record.prompt_key()] = prompt.prompt_ids

    def answer(key: str) -> _Answer:
        room = short.room(len(prompts[key]), server.responder.longest)
        return server.complete(prompts[key], Sampling(room), 1)[0]

    examples = []
    theirs = list[float]()
    for key, reply in server.client.ask(prompts, answer, server.probe).items():
        if reply is None:
            continue
        ids = prompts[key]
        if reply.prompt_tokens not in (None, 0, len(ids)):
            got = f"it reads {reply.prompt_tokens} tokens of a prompt of {len(ids)}"
            raise _other(server, got, "it applies a chat template, or drops a system prompt")
        tokens = list(reply.sample.ids)
        if reply.sample.end is not None:
            tokens.append(reply.sample.end)
        if len(tokens) == len(reply.logps) > 0:
            examples.append(Example(ids, (np.array(tokens, dtype=np.int32),)))
            theirs += reply.logps
    if not theirs:
        console.warn(f"{server}: unchecked, because there are no log-probs to compare")
        return
    # The server has the folder's weights, also where training quantises them.
    in_fp32 = replace(model, quantization=None, dtype=Dtype.fp32)
    exact, of_rounded = _logps(server, examples, in_fp32, device, (torch.float32, torch.bfloat16))
    [rounded] = _logps(server, examples, replace(in_fp32, dtype=Dtype.bf16), device, (torch.bfloat16,))
    by_rounding = np.abs(of_rounded - rounded)
    # A server has the weights in float32 or in bf16, and computes in either.
    size = min(float(np.abs(ours - np.array(theirs)).mean()) for ours in (exact, of_rounded))
    most = most_difference(by_rounding)
    result = (
        f"log-probs of {len(theirs):,} tokens differ from ours by {size:.4f} on average; "
        f"bf16 rounding makes {by_rounding.mean():.4f}"
    )
    if size > most:
        causes = "other weights, such as an earlier round's or a quantised copy, or reads other prompts"
        raise _other(server, f"{result}, and at most {most:.4f} may be", f"it probably serves {causes}")
    console.say(f"{server}: {result}")


def most_difference(by_rounding: npt.NDArray[np.float64]) -> float:
    """Return the most that a server's log-probs of these tokens may differ from ours on average."""
    standard_error = float(by_rounding.std()) / math.sqrt(len(by_rounding))
    return _MOST * (float(by_rounding.mean()) + _STANDARD_ERRORS * standard_error)


def _other(server: Server, got: str, cause: str) -> ConfigError:
    source = server.responder.source
    return ConfigError(
        "the server does not serve the model that should respond",
        where=_URL,
        got=f"{server}: {got}",
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
