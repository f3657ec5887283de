"""Responses of the policy to held-out prompts at evaluations, beside those of the reference."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from dpo_dist import atomic
from dpo_dist.config.run_folder import RunFolder
from dpo_dist.config.samples_schema import SamplesConfig
from dpo_dist.distributed.engine import PolicyEngine
from dpo_dist.distributed.world import World
from dpo_dist.generation.sampling.generate import NotFiniteError, Request, Sampling
from dpo_dist.generation.sampling.respond import texts_after
from dpo_dist.generation.sampling.together import generate_together
from dpo_dist.generation.text_facts import sample_metrics, text_facts
from dpo_dist.report.console import Console
from dpo_dist.training.run_start import write_on_main

Row = dict[str, Any]

_ESCAPED = {ord(end): f"\\u{ord(end):04x}" for end in "\u0085\u2028\u2029"}


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
class Samples:
    """The samples of a run. Methods are collective.

    Attributes:
        config: settings.
        sampling: the same as settings of generation.
        prompts: the same at every evaluation and in every start of the run.
        reference: responses of the reference, one for each prompt; None: not known.
        stop_ids: tokens that end a response.
        tokenizer: of the policy.
        policy: generates.
        folder: of the run.
    """

    config: SamplesConfig
    sampling: Sampling
    prompts: tuple[SamplePrompt, ...]
    reference: list[Row] | None
    stop_ids: frozenset[int]
    tokenizer: PreTrainedTokenizerBase
    policy: PolicyEngine
    world: World
    folder: RunFolder
    console: Console

    def is_due(self, step: int, eval_every: int, *, is_last: bool) -> bool:
        """Return whether the evaluation after `step` has samples; not collective."""
        return is_last or eval_every == 0 or step // eval_every % self.config.every == 0

    def at(self, step: int) -> dict[str, float]:
        """Write the policy's responses after `step`, and return their metrics `samples/...`.

        They are without metrics and a file if the model's logits are not finite.

        Raises:
            CheckpointError: the file cannot be written.
        """
        if step == 0 and self.reference is not None:
            responses = self.reference
        else:
            try:
                responses = respond(self, of_base=False)
            except NotFiniteError:
                self.console.say(f"warning: no samples after step {step}: logits are not finite")
                return {}
        without = dict.fromkeys(("text", "tokens", "finished"))
        rows = [
            {
                **prompt.fields,
                "step": step,
                **_named("policy", policy),
                **_named("reference", reference),
            }
            for prompt, policy, reference in zip(
                self.prompts, responses, self.reference or [without] * len(responses), strict=True
            )
        ]
        write_on_main(lambda: _write(self.folder, step, rows), self.folder, self.world)
        facts = [text_facts(row["text"], row["tokens"], row["finished"]) for row in responses]
        return sample_metrics(facts, [prompt.language for prompt in self.prompts])


def respond(samples: Samples, *, of_base: bool) -> list[Row]:
    """Return the `text`, `tokens` and `finished` of a response to each prompt; collective.

    Raises:
        NotFiniteError: the model's logits are not finite.
    """
    requests = [prompt.request for prompt in samples.prompts]
    found = generate_together(
        samples.policy,
        requests,
        samples.sampling,
        samples.stop_ids,
        samples.config.batch_tokens,
        samples.world,
        of_base=of_base,
    )
    return [
        {
            "text": _text(sample.ids, request, samples.tokenizer),
            "tokens": len(sample.ids),
            "finished": sample.is_finished,
        }
        for sample, request in zip(found, requests, strict=True)
    ]


def _text(ids: Sequence[int], request: Request, tokenizer: PreTrainedTokenizerBase) -> str:
    return texts_after(list(ids), request.prompt_ids, tokenizer)[0]


def _named(model: str, response: Row) -> Row:
    """Return a response as fields of a row: its text under the model's name."""
    return {
        model: response["text"],
        f"{model}_tokens": response["tokens"],
        f"{model}_finished": response["finished"],
    }


def _write(folder: RunFolder, step: int, rows: Sequence[Row]) -> None:
    atomic.write_text(folder.samples_file(step), lines(rows))


def lines(rows: Sequence[Row]) -> str:
    """Return rows as JSON lines; line ends in texts are escaped, also those that only Unicode knows."""
    whole = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return whole.translate(_ESCAPED)
