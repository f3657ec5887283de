"""Responses of a model, and log-probs of responses under it; its weights are loaded once."""

import heapq
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dpo_dist.batching.pack import Sequences, pack
from dpo_dist.batching.plan import consecutive_batches
from dpo_dist.config.schema import RunConfig
from dpo_dist.data.formats import read_prompts
from dpo_dist.data.records import Dialogue, PreferenceRecord, Prompt, eval_part, prompt_hash
from dpo_dist.data.sources import pinned, source_labels
from dpo_dist.distributed.memory import return_memory
from dpo_dist.distributed.zero import whole_loading
from dpo_dist.foundation.errors import DataError
from dpo_dist.foundation.files import text_digest
from dpo_dist.foundation.text import counted
from dpo_dist.generation.pairs.files import good_records, prompt_key, prompt_row, read_prompt_row
from dpo_dist.generation.pairs.prompts import as_asked, generation_settings
from dpo_dist.generation.sampling.generate import Request, Sample, Sampling, generate
from dpo_dist.generation.sampling.respond import (
    Answers,
    ModelSource,
    Responder,
    open_responder,
    respond,
)
from dpo_dist.generation.sampling.stages import Parts, Stages
from dpo_dist.insight.compare.start import KEY, Compared
from dpo_dist.model.exactness import StartCheck
from dpo_dist.model.load import load_packed
from dpo_dist.model.lora import load_adapter
from dpo_dist.model.packed import PackedCausalLM
from dpo_dist.reference.engine import scored_model

Row = dict[str, Any]
PART_PROMPTS = 16
"""Prompts of one part: processes share the parts, and finished ones are not repeated."""
BATCH_TOKENS = 16384
"""Most tokens of a batch of one process: its rows times the longest prompt with its response."""


def write_held_out(folder: Path, config: RunConfig, say: Callable[[str], None]) -> Parts:
    """Write `compare.prompts` different prompts of the evaluation data, as parts of a stage.

    They are chosen by a hash of the prompt, and written in the order of the data.
    """
    wanted, seen = config.compare.prompts, set[str]()

    def ranked() -> Iterator[tuple[str, int, Row]]:
        for index, (record, label) in enumerate(_held_out(config, say)):
            if (key := prompt_key(record)) not in seen:
                seen.add(key)
                yield text_digest(f"0 {key}"), index, _row(record, label)

    chosen = heapq.nsmallest(wanted, ranked())
    if not chosen:
        raise DataError(
            "the evaluation data have no usable prompt",
            where="data.eval",
            got=", ".join(source.path for source in config.data.eval_sources),
            remedy="check the counts above, or raise data.eval_share",
        )
    fewer = f", fewer than compare.prompts={wanted}" if len(chosen) < wanted else ""
    say(f"prompts: {len(chosen):,} of {counted(len(seen), 'different one')}{fewer}")
    rows = (row for _, _, row in sorted(chosen, key=lambda entry: entry[1]))
    return Parts.written(folder, "prompts", rows, PART_PROMPTS)


def shown_prompt(prompt: Prompt) -> str:
    """Return a prompt as one text: of a single user turn its content, of others their roles too."""
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, Dialogue):
        return prompt.text
    if len(prompt) == 1 and prompt[0].role == "user":
        return prompt[0].content
    return "\n\n".join(f"{turn.role}: {turn.content}" for turn in prompt)


def _row(record: PreferenceRecord, label: str) -> Row:
    chosen = record.responses[0] if record.responses else None
    if isinstance(chosen, tuple):  # of several turns, the last one's content
        chosen = chosen[-1].content
    return prompt_row(record) | {"chosen": chosen, "source": label}


def _held_out(config: RunConfig, say: Callable[[str], None]) -> Iterator[tuple[PreferenceRecord, str]]:
    """Yield the held-out records, with their responses if they have any, and the labels of their sources."""
    sources, part = config.data.eval_sources, eval_part(config.data)
    for source, label in zip(sources, source_labels(sources), strict=True):
        for record in good_records(read_prompts(pinned(source, None)), source, config.data, say):
            if part.has(prompt_hash(record.prompt)):
                yield as_asked(record, config.data), label


@dataclass(eq=False)
class Speaker:
    """A model of the comparison; its weights are loaded when a process has its first part to do.

    `logps` are of its responses under itself, `base_logps` under the base; None if that has other tokens.
    """

    compared: Compared
    source: ModelSource
    config: RunConfig
    stages: Stages
    folder: Path
    prompts: Parts
    responses: Parts = field(init=False)
    logps: Parts = field(init=False)
    base_logps: Parts | None = None

    @property
    def name(self) -> str:
        """Its name in the results."""
        return self.compared.name

    @property
    def _sampling(self) -> Sampling:
        return Sampling(self.config.compare.max_new_tokens, self.config.compare.temperature)

    @cached_property
    def responder(self) -> Responder:
        """Its tokenizer and stop tokens."""
        return open_responder(self.source, self.config, KEY)

    @cached_property
    def _packed(self) -> PackedCausalLM:
        scored = scored_model(self.config)
        bits = self.config.model.quantization
        model_config = replace(scored, quantization=bits, compile=False, liger=False)
        longest = self.config.data.max_length + self._sampling.max_new_tokens
        if self.responder.longest is not None:
            longest = min(longest, self.responder.longest)
        world = self.stages.world
        with whole_loading(world):
            packed = load_packed(self.source.folder, model_config, longest, world.device)
            if self.source.adapter is not None:
                load_adapter(packed, self.source.adapter, KEY)
        packed.eval()
        StartCheck(packed, packed, world.device, longest, KEY).settle()
        return packed

    def respond(self) -> None:
        """Finish the responses; collective. Models share the random numbers of a prompt."""
        prompts = self.prompts
        settings = generation_settings(self.config, prompts, self._sampling) | {"model": self.source.digest}
        parts = Parts.of(self.folder, "responses", settings, prompts.count)

        def samples(requests: Sequence[Request], sampling: Sampling) -> list[Sample]:
            with self._packed.unpacked() as causal_lm:
                return generate(causal_lm, requests, sampling, self.responder.stop_ids, BATCH_TOKENS)

        def part(index: int) -> list[Row]:
            records, numbers = list(map(read_prompt_row, prompts.read(index))), range(1)
            rows = respond(records, self.responder, samples, self._sampling, numbers, keeps_ids=True)
            return [asdict(row) for row in rows]

        self.responses = self.stages.finish(f"responses of {self.name}", parts, part)

    def score(self, other: "Speaker") -> Parts:
        """Return the finished log-probs of a model's responses under this model; collective.

        Each row is `{"logp": ...}`, the sum over the tokens of the response to that prompt, null without one.
        """
        settings = {
            "responses": other.responses.folder.name,
            "model": self.source.digest,
            "attention": str(self.config.model.attention),
        }
        parts = Parts.of(self.folder, "logps", settings, self.prompts.count)

        def part(index: int) -> list[Row]:
            rows = [Answers.of(row) for row in other.responses.read(index)]
            found = response_logps(self._packed, rows, BATCH_TOKENS, self.stages.world.device)
            return [{"logp": logp} for logp in found]

        title = f"log-probs of {other.name}"
        title += "" if other is self else f"'s responses under {self.name}"
        return self.stages.finish(title, parts, part)

    def has_tokens_of(self, other: "Speaker") -> bool:
        """Return whether every token of the other model is the same token of this one."""
        own, tokens = self.responder.tokenizer.get_vocab(), other.responder.tokenizer.get_vocab()
        return all(own.get(token) == number for token, number in tokens.items())

    def free(self) -> None:
        """Forget the weights."""
        vars(self).pop("_packed", None)
        return_memory()

    def rows(self, index: int) -> Iterator[tuple[Answers, Row]]:
        """Yield the answers to each prompt of a part, and the response as in `answers.jsonl`."""
        under = [None if parts is None else parts.read(index) for parts in (self.logps, self.base_logps)]
        for at, row in enumerate(self.responses.read(index)):
            answers = Answers.of(row)
            logp, base_logp = (None if rows is None else rows[at]["logp"] for rows in under)
            response = {}
            for answer in answers.answers:
                response = {
                    "text": answer.content,
                    "tokens": answer.tokens,
                    "finished": answer.finished,
                    "logp": logp,
                    "base_logp": base_logp,
                    "logp_tokens": len(answer.ids),
                }
            yield answers, response


@torch.inference_mode()
def response_logps(
    packed: PackedCausalLM, rows: Sequence[Answers], budget: int, device: torch.device
) -> list[float | None]:
    """Return the sum of the log-probs of each row's response, in nats; None without a response."""
    sequences = {
        index: Sequences(
            np.array(row.prompt_ids, dtype=np.int32), (np.array(row.answers[0].ids, dtype=np.int32),)
        )
        for index, row in enumerate(rows)
        if row.answers
    }
    # A response without tokens has probability 1.
    sums: dict[int, float] = {at: 0.0 for at, one in sequences.items() if not len(one.responses[0])}
    scored = [at for at in sequences if at not in sums]
    layout = [(len(sequences[at].prompt_ids), len(sequences[at].responses[0])) for at in scored]
    for part in consecutive_batches(layout, budget, packed.arrangement):
        batch = scored[part.start : part.stop]
        batched = pack([sequences[at] for at in batch], np.zeros((len(batch), 2), dtype=np.uint64))
        logps = packed(batched.to(device)).double().cpu()
        of_each = logps.split(batched.response_tokens.tolist())
        sums |= {at: float(own.sum()) for at, own in zip(batch, of_each, strict=True)}
    return [sums.get(index) for index in range(len(rows))]
