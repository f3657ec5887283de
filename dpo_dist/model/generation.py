"""Check that a model generates, in batches, what its own forward predicts; the call of transformers for both.

Caches of some architectures are wrong after padding, or at all: MiniMax, RecurrentGemma, RWKV, xLSTM.
"""

import itertools
import logging
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteriaList

from dpo_dist.batching.pack import joined_inputs
from dpo_dist.data import Example, ImageInput, TokenIds
from dpo_dist.foundation.errors import DeviceMemoryError, first_line
from dpo_dist.model.architectures import context_length
from dpo_dist.model.exactness import LONGEST, Agree, Rounding, changes, trial_examples
from dpo_dist.model.images import ImageReader
from dpo_dist.model.packed import accepted_inputs, reset_rope

log = logging.getLogger(__name__)

_STEPS = 4
"""Tokens that are generated: a wrong cache shows from the second token on."""
_SHORTEST = 2
"""Tokens of the short prompt: in a state that has read few tokens, the padding before them counts most."""


class NotFiniteError(Exception):
    """A model's logits for the next token are not finite."""


class WrongGenerationError(Exception):
    """A model generates by other log-probs than its own forward computes, also without padding."""


def image_inputs(causal_lm: Any, ids: Tensor, images: Sequence[ImageInput]) -> dict[str, Tensor]:
    """Return what the model's forward needs for the images in `ids` [rows, tokens], in their order."""
    return ImageReader(causal_lm).own_inputs(joined_inputs(images), ids) if images else {}


def extend(
    causal_lm: Any,
    prompts: Sequence[TokenIds],
    images: Sequence[ImageInput],
    next_token: LogitsProcessor,
    new_tokens: int,
    device: torch.device,
    filler: int,
    *,
    stop_ids: Collection[int] = (),
    is_synchronised: bool = False,
    must_end: Callable[[], bool] = lambda: False,
) -> list[list[int]]:
    """Return the tokens after each prompt that `next_token` chooses; a row that has ended gets `filler`.

    The prompts are padded with `filler` on the left to one length. `images` are those of all prompts.
    """
    rows = [torch.from_numpy(prompt.astype(np.int64)) for prompt in prompts]
    ids = pad_sequence(rows, True, filler, padding_side="left").to(device)
    mask = pad_sequence(list(map(torch.ones_like, rows)), True, padding_side="left")

    def end(ids: Tensor, *_: Any) -> Tensor:
        return torch.full((len(ids),), must_end(), device=ids.device)

    reset_rope(causal_lm)  # frequencies of a longer batch before this one would stay
    # Defaults of the model's folder, such as a repetition penalty, would change the distribution. They come
    # back: chat generates by them after the check.
    defaults = causal_lm.generation_config
    causal_lm.generation_config = GenerationConfig()
    try:
        output = causal_lm.generate(
            input_ids=ids,
            attention_mask=mask.to(device),
            **image_inputs(causal_lm, ids, images),
            generation_config=GenerationConfig(
                max_new_tokens=new_tokens,
                do_sample=False,
                eos_token_id=sorted(stop_ids) or None,
                pad_token_id=filler,
            ),
            logits_processor=LogitsProcessorList([next_token]),
            stopping_criteria=StoppingCriteriaList([end]),
            synced_gpus=is_synchronised,
        )
    finally:
        causal_lm.generation_config = defaults
    new_tokens_of_rows: list[list[int]] = output[:, ids.shape[1] :].tolist()
    return new_tokens_of_rows


_Faults = tuple[str, str]
"""Of batches with prompts of different lengths, and, if they have one, of prompts of one length."""
_FAULTS: WeakKeyDictionary[nn.Module, dict[bool, _Faults]] = WeakKeyDictionary()


@torch.no_grad()
def can_mix_lengths(
    causal_lm: Any,
    device: torch.device,
    filler: int,
    images: Sequence[ImageInput] = (),
    agree: Agree = str,
    *,
    is_synchronised: bool = False,
) -> bool:
    """Return whether the prompts of a batch may have different lengths; a model is checked once.

    `images`: some of those that prompts have. All ranks of `agree` call this together, and get one answer.
    Raises WrongGenerationError if the prompts of a batch may not even have one length, and NotFiniteError.
    """
    faults = _FAULTS.setdefault(causal_lm, {})
    has_images = bool(images)
    kind = str(causal_lm.config.model_type)
    if has_images not in faults:
        middle = sorted(images, key=lambda image: image.tokens)[len(images) // 2 :][:1]
        check = _Check(causal_lm, device, filler, middle, agree, is_synchronised=is_synchronised)
        faults[has_images] = check.faults()
        for fault in filter(None, faults[has_images]):
            log.info("%s, generating: %s", kind, fault)
    padded, equal = faults[has_images]
    if equal:
        raise WrongGenerationError(f"{kind} does not generate what its own forward predicts: {equal}")
    return not padded


class _Check:
    """Generates given tokens after invented prompts, and compares their log-probs with a plain forward's.

    Log-probs of all tokens are compared, not the likeliest token, which rounding may change.
    """

    def __init__(
        self,
        causal_lm: Any,
        device: torch.device,
        filler: int,
        images: Sequence[ImageInput],
        agree: Agree,
        *,
        is_synchronised: bool,
    ):
        self._causal_lm = causal_lm
        self._device = device
        self._filler = filler
        self._agree = agree
        self._is_synchronised = is_synchronised
        *others, last = trial_examples(causal_lm, context_length(causal_lm.config) or LONGEST, images)
        short = replace(last, prompt_ids=last.prompt_ids[:_SHORTEST])
        examples = [*others, short]
        steps = min(_STEPS, *(len(example.responses[-1]) for example in examples))
        self._rows = [replace(each, responses=(each.responses[-1][:steps],)) for each in examples]

    def faults(self) -> _Faults:
        """Return the fault of batches with prompts of different lengths, then of batches with equal ones."""
        padded = self._agreed_fault(lambda: self._fault(self._rows))
        equal = padded and self._agreed_fault(self._fault_of_equal_lengths)
        if equal and self._agree(self._effect_of_later_tokens()):
            # The plain forward of a model that is not causal (PaliGemma) says nothing of its generation.
            return "", ""
        return padded, equal

    def _agreed_fault(self, work: Callable[[], str]) -> str:
        """Return the first fault of a rank; raise NotFiniteError if some rank's log-probs are no numbers.

        A model can raise anything where transformers' cache does not fit it. All ranks make the same calls.
        """
        fault = ""
        is_finite = True
        try:
            fault = work()
        except NotFiniteError:
            is_finite = False
        except (DeviceMemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            fault = first_line(error)
            log.info("%s, generating:", self._causal_lm.config.model_type, exc_info=True)
        if self._agree("" if is_finite else "not finite"):
            raise NotFiniteError
        return self._agree(fault)

    def _fault_of_equal_lengths(self) -> str:
        # All, also after a fault: forwards are collective, and ranks may round to both sides of a limit.
        faults = [self._fault([row, _turned(row)]) for row in self._rows]
        return next(filter(None, faults), "")

    def _effect_of_later_tokens(self) -> str:
        """Return how much later tokens change the first log-probs; empty if rounding explains it."""
        row = self._rows[-1]
        first, rounding = Rounding.measured(self._causal_lm, lambda: self._plain(row)[0])
        alone = self._plain(replace(row, responses=(row.responses[0][:1],)))[0]
        return rounding.unexplained(changes(alone, first))

    def _fault(self, rows: Sequence[Example]) -> str:
        """Return how much the log-probs of some row differ in this batch; empty if rounding explains it."""
        plain, rounding = Rounding.measured(
            self._causal_lm, lambda: torch.stack(list(map(self._plain, rows)))
        )
        if plain.isnan().any():
            raise NotFiniteError
        faults = map(rounding.unexplained, changes(self._generated(rows), plain))
        return next(filter(None, faults), "")

    def _plain(self, row: Example) -> Tensor:
        """Return the log-probs of all tokens at each step, [steps, vocabulary], without padding and cache."""
        [response] = row.responses
        tokens = np.concatenate((row.prompt_ids, response[:-1])).astype(np.int64)
        ids = torch.from_numpy(tokens)[None].to(self._device)
        inputs: dict[str, Any] = {**image_inputs(self._causal_lm, ids, row.images)}
        if accepted_inputs(self._causal_lm, {"use_cache"}):
            inputs["use_cache"] = False
        with ImageReader(self._causal_lm).by_own_forward():
            logits: Tensor = self._causal_lm(input_ids=ids, **inputs).logits
        return logits[0, -len(response) :].float().log_softmax(-1)

    def _generated(self, rows: Sequence[Example]) -> Tensor:
        """Return the same by generation in one batch, [rows, steps, vocabulary]."""
        responses = np.stack([row.responses[0] for row in rows]).astype(np.int64)
        forced = _ForcedTokens(torch.from_numpy(responses).to(self._device))
        extend(
            self._causal_lm,
            [row.prompt_ids for row in rows],
            list(itertools.chain.from_iterable(row.images for row in rows)),
            forced,
            responses.shape[1],
            self._device,
            self._filler,
            is_synchronised=self._is_synchronised,
        )
        return torch.stack(forced.logps, dim=1)


def _turned(row: Example) -> Example:
    """Return a row of the same length: other tokens in the prompt, but where it has images."""
    return row if row.images else replace(row, prompt_ids=row.prompt_ids[::-1].copy())


class _ForcedTokens(LogitsProcessor):  # type: ignore[misc]
    """Chooses the given tokens [rows, steps], and keeps the log-probs of all tokens at each step."""

    def __init__(self, tokens: Tensor):
        self._tokens = tokens
        self.logps: list[Tensor] = []

    def __call__(self, _input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return logits [rows, vocabulary] that are finite for the given token only."""
        token = self._tokens[:, len(self.logps), None]
        self.logps.append(scores.float().log_softmax(-1))
        return torch.full_like(scores, -torch.inf).scatter(-1, token, 0.0)
