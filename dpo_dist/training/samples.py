"""Responses of the policy to held-out prompts at evaluations, beside those of the reference."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from dpo_dist import atomic
from dpo_dist.config.run_folder import RunFolder
from dpo_dist.config.samples_schema import SamplesConfig
from dpo_dist.distributed.engine import PolicyEngine
from dpo_dist.distributed.world import World
from dpo_dist.generation.pair_records import json_line
from dpo_dist.generation.sampling.generate import NotFiniteError, Request, Sampling
from dpo_dist.generation.sampling.respond import texts_after
from dpo_dist.generation.sampling.together import Generator, generate_together
from dpo_dist.generation.text_facts import sample_metrics, text_facts
from dpo_dist.report.recorder import spared
from dpo_dist.report.terminal.console import Console
from dpo_dist.training.run_start import write_on_main

Row = dict[str, Any]


@dataclass(frozen=True)
class SamplePrompt:
    """A held-out prompt.

    Attributes:
        request: its token ids and key.
        fields: `prompt`, `prompt_id`, `source` and `chosen` of its rows.
        language: of the chosen response; None if it is not clear.
    """

    request: Request
    fields: Row
    language: str | None


@dataclass(frozen=True)
class SamplePrompts:
    """The held-out prompts of a run, and how models respond to them.

    Attributes:
        config: settings.
        sampling: the same as settings of generation.
        prompts: the same at every evaluation and in every start of the run.
        stop_ids: tokens that end a response.
        tokenizer: of the policy.
        folder: of the run.
    """

    config: SamplesConfig
    sampling: Sampling
    prompts: tuple[SamplePrompt, ...]
    stop_ids: frozenset[int]
    tokenizer: PreTrainedTokenizerBase
    world: World
    folder: RunFolder
    console: Console

    def responses(
        self, model: Generator, *, of_base: bool = False, give_way: Callable[[], None] = lambda: None
    ) -> list[Row] | None:
        """Return the `text`, `tokens` and `finished` of a response to each prompt; collective.

        `give_way` is called before each batch, and may raise.

        None, with a warning, if the model's logits are not finite.
        """
        requests = [prompt.request for prompt in self.prompts]
        budget = self.config.batch_tokens
        try:
            found = generate_together(
                model,
                requests,
                self.sampling,
                self.stop_ids,
                budget,
                self.world,
                of_base=of_base,
                give_way=give_way,
            )
        except NotFiniteError:
            self.console.say("warning: no samples: the model's logits are not finite")
            return None
        return [
            {
                "text": texts_after(list(sample.ids), request.prompt_ids, self.tokenizer)[0],
                "tokens": len(sample.ids),
                "finished": sample.is_finished,
            }
            for sample, request in zip(found, requests, strict=True)
        ]

    def metrics(self, responses: Sequence[Row]) -> dict[str, float]:
        """Return the metrics of responses by name: see `sample_metrics`."""
        facts = [text_facts(row["text"], row["tokens"], row["finished"]) for row in responses]
        return sample_metrics(facts, [prompt.language for prompt in self.prompts])

    def read_reference(self) -> list[Row] | None:
        """Return the responses in the reference's file, if they are to the same prompts and settings."""
        try:
            text = self.folder.samples_reference.read_text(encoding="utf-8")
            rows = [json.loads(line) for line in text.splitlines()]
            wanted = [(prompt.fields["prompt_id"], asdict(self.sampling)) for prompt in self.prompts]
            if [(row["prompt_id"], row["sampling"]) for row in rows] != wanted:
                return None
            return [{name: row[name] for name in ("text", "tokens", "finished")} for row in rows]
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return None

    def write_reference(self, responses: Sequence[Row]) -> None:
        """Write the reference's responses to its file; collective.

        Raises:
            CheckpointError: the file cannot be written.
        """
        rows = [
            {"prompt_id": prompt.fields["prompt_id"], "sampling": asdict(self.sampling), **response}
            for prompt, response in zip(self.prompts, responses, strict=True)
        ]
        file = self.folder.samples_reference
        write_on_main(lambda: atomic.write_text(file, lines(rows)), self.folder, self.world)


@dataclass(frozen=True)
class Samples:
    """The samples of a run. Methods are collective.

    Attributes:
        held_out: the prompts.
        reference: responses of the reference, one for each prompt; None: not known.
        starts_as_reference: whether they are those of the policy before its first step.
        policy: generates.
    """

    held_out: SamplePrompts
    reference: list[Row] | None
    starts_as_reference: bool
    policy: PolicyEngine

    def is_due(self, step: int, eval_every: int, *, is_last: bool) -> bool:
        """Return whether the evaluation after `step` has samples; not collective."""
        return is_last or eval_every == 0 or step // eval_every % self.held_out.config.every == 0

    def at(self, step: int, give_way: Callable[[], None] = lambda: None) -> dict[str, float]:
        """Write the policy's responses after `step`, and return their metrics `samples/...`.

        `give_way` is called before each batch of prompts, and may raise.

        They are without metrics and a file if the model's logits are not finite, and without metrics, with a
        warning, after a bug in these.

        Raises:
            CheckpointError: the file cannot be written.
        """
        held_out = self.held_out
        is_reference = step == 0 and self.starts_as_reference and self.reference is not None
        responses = self.reference if is_reference else held_out.responses(self.policy, give_way=give_way)
        if responses is None:
            return {}
        file, text = held_out.folder.samples_file(step), lines(self._rows(step, responses))

        def write() -> dict[str, float]:
            metrics: dict[str, float] = {}
            atomic.write_text(file, text)
            with spared("the row of metrics of samples", held_out.console.say):
                metrics = self._metrics(responses)
            return metrics  # noqa: RET504 (a bug ends the block before)

        return write_on_main(write, held_out.folder, held_out.world)

    def _metrics(self, responses: Sequence[Row]) -> dict[str, float]:
        of_policy = self.held_out.metrics(responses)
        of_reference = {} if self.reference is None else self.held_out.metrics(self.reference)
        return {
            "samples/prompts": float(len(responses)),
            **{f"samples/{name}": value for name, value in of_policy.items()},
            **{f"samples/reference_{name}": value for name, value in of_reference.items()},
        }

    def _rows(self, step: int, responses: Sequence[Row]) -> list[Row]:
        unknown = dict.fromkeys(("text", "tokens", "finished"))
        reference = self.reference or [unknown] * len(responses)
        return [
            {
                **prompt.fields,
                "step": step,
                **_named("policy", of_policy),
                **_named("reference", of_reference),
            }
            for prompt, of_policy, of_reference in zip(
                self.held_out.prompts, responses, reference, strict=True
            )
        ]


def _named(model: str, response: Row) -> Row:
    """Return a response as fields of a row: its text under the model's name."""
    return {
        model: response["text"],
        f"{model}_tokens": response["tokens"],
        f"{model}_finished": response["finished"],
    }


def lines(rows: Sequence[Row]) -> str:
    """Return rows as JSON lines."""
    return "".join(map(json_line, rows))
