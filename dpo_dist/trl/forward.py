"""The forward of a model in TRL's trainers: packed rows in place of padded ones, each shared prefix once.

TRL's trainers call a model with `labels` and `fused_lm_head=True`, and get values of each token that a label
counts (`trl.trainer.utils.add_fused_lm_head`). That forward accepts labels that are already shifted, and then
scores what the model's body returns. So the body gets one packed sequence here, its hidden states at the
counted tokens go through TRL's own head, and the values are put back into TRL's rows. Everything happens
inside of the model's own forward: what DDP, DeepSpeed and FSDP do around it, they do as for TRL's forward.
"""

import functools
import logging
import types
import weakref
from collections.abc import Callable, Iterable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from trl.trainer.utils import FusedCausalLMOutput

from dpo_dist.batching.content_keys import Keys, response_keys
from dpo_dist.batching.costs import Arrangement, ComputeCosts
from dpo_dist.batching.pack import pack
from dpo_dist.config.schema import AttentionBackend, Dtype
from dpo_dist.data import Example
from dpo_dist.distributed.deepspeed_internals import is_sharded
from dpo_dist.foundation.errors import first_line
from dpo_dist.foundation.process import this_rank
from dpo_dist.model.architectures import NOISES, recorded_arrangement
from dpo_dist.model.attention.kernels import PACKED, choose_backend, packed_attention
from dpo_dist.model.exactness import Rounding, rounded_once_more
from dpo_dist.model.flops import compute_costs, step_flops
from dpo_dist.model.library_internals import (
    adapters_in_use,
    attention_name,
    can_choose_attention,
    compute_beside,
    fork_states,
    whole_mask,
)
from dpo_dist.model.packed import rope_limit
from dpo_dist.model.states import ForkedStates
from dpo_dist.trl.others_code import foreign_code
from dpo_dist.trl.reference import KeptReference, gathered

log = logging.getLogger(__name__)

IGNORED = -100
"""The label of a token that is not counted."""
VALUES = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
"""The values of each token in TRL's `FusedCausalLMOutput`."""
REFERENCE_ADAPTER = "ref"
"""What TRL calls its copy of a continued adapter."""
_TENSORS = ("input_ids", "attention_mask")
_INPUTS = {*_TENSORS, "use_cache"}
"""What TRL's trainers pass of a batch of text."""
_is_packed = ContextVar("is_packed", default=False)


@dataclass(frozen=True)
class CountedRows:
    """The rows of a padded batch that count a token, without padding, as prompts with their responses.

    `order`: of each response, in the order of the examples, the row of the batch. `places`: bool [rows,
    length - 1], where the values of the counted tokens are in TRL's rows.
    """

    examples: list[Example]
    order: list[int]
    places: npt.NDArray[np.bool_]

    @classmethod
    def from_padded(cls, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> "CountedRows":
        """Return the rows; a row's response begins with its first counted token."""
        ids, labels_on_host = input_ids.cpu().numpy(), labels.cpu().numpy()
        is_token = attention_mask.cpu().numpy().astype(bool)
        places = np.zeros((len(ids), ids.shape[1] - 1), dtype=np.bool_)
        by_prompt: dict[bytes, list[tuple[int, Any, Any, Any]]] = {}
        for row, columns in enumerate(map(np.flatnonzero, is_token)):
            tokens = ids[row][columns].astype(np.int32)
            counted = labels_on_host[row][columns] != IGNORED
            counted[:1] = False  # nothing predicts the first token
            places[row, columns[counted] - 1] = True
            if counted.any():
                begin = int(counted.argmax())
                prompt = tokens[:begin]
                by_prompt.setdefault(prompt.tobytes(), []).append(
                    (row, prompt, tokens[begin:], counted[begin:])
                )
        examples = list[Example]()
        order = list[int]()
        for members in by_prompt.values():
            rows, prompts, responses, masks = zip(*members, strict=True)
            examples.append(Example(prompts[0], responses, masks))
            order += rows
        return cls(examples, order, places)

    def in_rows(self, values: list[Tensor]) -> Tensor:
        """Return values of the responses' counted tokens, response after response, in TRL's rows."""
        by_row = dict(zip(self.order, values, strict=True))
        ordered = torch.cat([by_row[row] for row in sorted(by_row)])
        places = torch.from_numpy(self.places).to(ordered.device)
        return ordered.new_zeros(places.shape).masked_scatter(places, ordered)


class Fallback:
    """Whether the models of a trainer compute packed rows; what was said of it."""

    def __init__(self, reason: str) -> None:
        self.reason = ""
        """Why rows are padded, by TRL's own forward; empty if they are packed."""
        self._said = set[str]()
        if reason:
            self.stop(reason)

    def stop(self, reason: str) -> None:
        """Compute by TRL's forward from now on."""
        self.reason = reason
        self.say(f"computed by TRL's own forward, with padding: {reason}")

    def say(self, line: str) -> None:
        """Say a line once, on rank 0."""
        if line not in self._said and this_rank() == 0:
            log.warning("dpo_dist: %s", line)
        self._said.add(line)


class PackedForward:
    """Makes the forward of a model compute packed rows where TRL's trainers ask for values of tokens.

    The model keeps this forward, as it keeps TRL's, and computes by TRL's once `fallback`, which belongs to
    the trainer, is gone.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        fallback: Fallback,
        reference: KeptReference | None,
        *,
        is_reference: bool = False,
    ):
        self._fallback = weakref.ref(fallback)
        self._reference = reference
        self.is_reference = is_reference
        """Whether each call asks the reference; else those with the adapter off, or with TRL's copy of it."""
        # Without the model: a copy of the model computes by its own weights.
        self._own: Callable[..., Any] = model.forward.__func__
        self._checked = set[bool]()
        """The modes (training or not) in which packed values were compared: noise is in training only."""
        self._costs: ComputeCosts | None = None
        if fallback.reason:
            return
        self._forks_states = fork_states(model)
        if not any(map(is_sharded, model.parameters())):
            self._costs = compute_costs(step_flops(model), prefixes=True, backend=_backend(model)[0])
        compute_beside(attention_name(model), PACKED, _is_packed.get)
        packed = self

        @functools.wraps(self._own)
        def forward(self: Any, *arguments: Any, **options: Any) -> Any:
            return packed.forward(self, *arguments, **options)

        model.forward = types.MethodType(forward, model)

    def forward(
        self,
        model: PreTrainedModel,
        *arguments: Any,
        fused_lm_head: bool = False,
        labels: Tensor | None = None,
        **inputs: Any,
    ) -> Any:
        """Return what TRL's forward returns."""
        fallback = self._fallback()
        if not fused_lm_head or fallback is None or fallback.reason:
            given = {} if labels is None else {"labels": labels}
            return self._own(model, *arguments, fused_lm_head=fused_lm_head, **given, **inputs)
        own = functools.partial(self._own, model, *arguments, fused_lm_head=True, labels=labels, **inputs)
        others = [name for name, value in inputs.items() if name not in _INPUTS and value is not None]
        if arguments or others or any(value is None for value in (labels, *map(inputs.get, _TENSORS))):
            what = ", ".join(others) or "other arguments than by name, or without a mask or labels"
            fallback.say(f"computed by TRL's own forward, with padding: batches with {what}")
            return own()
        assert labels is not None
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        reference = self._asked(model)
        if reference is None:
            return self._computed(model, fallback, CountedRows.from_padded(ids, mask, labels), own)
        # The store has all tokens of a response, whatever the loss counts.
        whole = _whole_responses(ids, mask, labels)
        rows = CountedRows.from_padded(ids, mask, whole)
        keys = response_keys(rows.examples)
        of_whole = functools.partial(own, labels=whole)
        outputs = self._stored(model, reference, keys, rows, of_whole)
        if outputs is None:
            outputs = self._computed(model, fallback, rows, of_whole)
            if not fallback.reason:
                places = torch.from_numpy(rows.places).to(ids.device)
                flat = outputs.log_probs.detach().float()[places].cpu().numpy()
                by_row = dict(enumerate(np.split(flat, np.cumsum(rows.places.sum(1))[:-1])))
                reference.keep(keys, [by_row[row] for row in rows.order])
        for name in VALUES:
            if (value := getattr(outputs, name)) is not None:
                outputs[name] = value.masked_fill(labels[:, 1:] == IGNORED, 0)
        return outputs

    def _asked(self, model: PreTrainedModel) -> KeptReference | None:
        """Return the reference's log-probs if this call asks the reference."""
        if self._reference is None or torch.is_grad_enabled():
            return None
        is_asked = self.is_reference or adapters_in_use(model) in (frozenset(), {REFERENCE_ADAPTER})
        return self._reference if is_asked else None

    def _stored(
        self,
        model: PreTrainedModel,
        reference: KeptReference,
        keys: Keys,
        rows: CountedRows,
        own: Callable[[], Any],
    ) -> Any:
        """Return the reference's log-probs in the store, None if they have to be computed.

        The reference is asked once, too, when the store answers for the first time: what it computes may
        depend on something that is not in the store's key.
        """
        stored = reference.find(model, keys)
        if stored is None:
            return None
        parts = [torch.from_numpy(part.copy()).to(model.device) for part in stored]
        empty = torch.zeros(rows.places.shape, device=model.device)
        outputs = FusedCausalLMOutput(log_probs=rows.in_rows(parts) if parts else empty)
        if not reference.is_compared:
            fault = self._agreed_fault(model, rows, own, lambda: outputs)
            reference.note_comparison(fault)
            if fault:
                return None
        return outputs

    def _computed(
        self, model: PreTrainedModel, fallback: Fallback, rows: CountedRows, own: Callable[[], Any]
    ) -> Any:
        """Return the values of one packed sequence; they are compared with TRL's once in each mode.

        All ranks compare at the same call, also one whose rows count no token: forwards may be collective.
        """
        is_checked = model.training in self._checked
        foreign = foreign_code(model)
        if not is_checked:
            foreign = _first(gathered(foreign))
        if foreign:
            why = f"hooks or forwards of {foreign} on layers expect its rows"
            fallback.say(f"computed by TRL's own forward, with padding: {why}")
            return own()

        def packed() -> Any:
            return self._packed(model, rows) if rows.examples else own()

        if not is_checked:
            self._checked.add(model.training)
            if fault := self._agreed_fault(model, rows, own, packed):
                fallback.stop(fault)
                return own()
        return packed()

    def _agreed_fault(
        self, model: PreTrainedModel, rows: CountedRows, own: Callable[[], Any], other: Callable[[], Any]
    ) -> str:
        """Return the fault of the first rank that has one; collective."""
        gpus = [model.device] if model.device.type == "cuda" else []
        with torch.random.fork_rng(gpus):  # TRL's forward draws the same noise as without a comparison
            return _first(gathered(self._fault(model, rows, own, other)))

    @torch.no_grad()
    def _fault(
        self, model: PreTrainedModel, rows: CountedRows, own: Callable[[], Any], other: Callable[[], Any]
    ) -> str:
        """Return how other log-probs differ from TRL's; empty if rounding explains it."""
        if model.training and (source := _noise(model)):  # of a fresh adapter only gradients show it
            return f"{source} is on"

        def values(outputs: Any) -> Tensor:
            logps: Tensor = outputs.log_probs.float().cpu()[torch.from_numpy(rows.places)]
            return logps

        theirs = values(own())
        noise = 0.0
        dtype = _backend(model)[1]
        if dtype is not torch.float32:
            with rounded_once_more(model, dtype):
                again = values(own())
            noise = float((again - theirs).abs().mean()) if len(theirs) else 0.0
        try:
            differences = (values(other()) - theirs).abs()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a model can raise anything if it is called in an unusual way
            log.info("in the comparison at the start:", exc_info=True)
            return first_line(error)
        if not len(theirs):
            return ""
        rounding = Rounding(dtype is torch.float32, float(theirs.std(correction=0)), noise)
        return rounding.unexplained(differences)

    def _packed(self, model: PreTrainedModel, rows: CountedRows) -> Any:
        """Return the values of one packed sequence in TRL's rows."""
        device = model.device
        unkeyed = np.zeros((len(rows.order), 2), dtype=np.uint64)
        batch = pack(rows.examples, unkeyed, costs=self._costs).to(device)
        predictors = batch.predictors
        inputs: dict[str, Any] = {"position_ids": batch.position_ids[None]}
        if self._forks_states:
            inputs["packed_states"] = ForkedStates(batch.segments, device)
        attention, dtype = packed_attention(batch.segments, _backend(model)[0], device), _backend(model)[1]

        def in_autocast(query: Tensor, key: Tensor, value: Tensor, scores: Any) -> Tensor:
            # Rotated by positions in float32, queries are float32 under autocast, which kernels do not cast.
            if torch.is_autocast_enabled(device.type):
                query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
            return attention(query, key, value, scores)

        in_autocast.is_beside = True  # type: ignore[attr-defined]

        def select(_module: nn.Module, _inputs: Any, outputs: Any) -> Any:
            hidden = outputs.last_hidden_state
            outputs.last_hidden_state = hidden.index_select(1, predictors.to(hidden.device))
            return outputs

        ids = batch.input_ids[None]
        hook, token = model.base_model.register_forward_hook(select), _is_packed.set(True)
        try:
            outputs = self._own(
                model,
                input_ids=ids,
                attention_mask=whole_mask(ids),
                shift_labels=batch.targets[None],
                fused_lm_head=True,
                packed=in_autocast,
                packed_positions=batch.position_ids,
                **inputs,
            )
        finally:
            _is_packed.reset(token)
            hook.remove()
        lengths = batch.response_tokens.tolist()
        for name in VALUES:
            if (value := getattr(outputs, name)) is not None:
                outputs[name] = rows.in_rows(list(value[0].split(lengths)))
        outputs.label_mask = torch.from_numpy(rows.places).to(outputs.log_probs.device)
        return outputs


def _first(faults: Iterable[str]) -> str:
    return next(filter(None, faults), "")


def _whole_responses(input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Tensor:
    """Return labels that count all tokens from the first one on that `labels` count."""
    begun = (labels != IGNORED).cumsum(1) > 0
    return input_ids.masked_fill(~(begun & attention_mask.bool()), IGNORED)


def _backend(model: PreTrainedModel) -> tuple[AttentionBackend, torch.dtype]:
    """Return the kernel of packed attention, and the type in which the model computes now."""
    dtype, device = model.dtype, model.device
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    kind = Dtype.fp32 if dtype == torch.float32 else Dtype.bf16
    return choose_backend(AttentionBackend.auto, kind, device), dtype


def why_padded(models: Sequence[PreTrainedModel], adapters: Iterable[Any], trainer: Any) -> str:
    """Return why the rows of a trainer's models cannot be packed; empty if they can."""
    if any(config.is_prompt_learning for config in adapters):
        return "the adapter writes virtual tokens before each row"
    if trainer.aux_loss_enabled:
        return "the loss of routers counts the tokens of padded rows"
    if trainer.is_fsdp_enabled and not trainer.accelerator.is_fsdp2:
        return "FSDP 1 hides the weights of layers; write fsdp_config={'version': 2}"
    if trainer.args.torch_compile or any(model._compiled_call_impl is not None for model in models):
        return "a forward is compiled for rows of one shape"
    if trainer.args.neftune_noise_alpha is not None:
        return "neftune_noise_alpha is on"
    return _first(map(_why_unpackable, models))


def _why_unpackable(model: PreTrainedModel) -> str:
    text = model.config.get_text_config()
    kind = str(text.model_type)
    if text is not model.config or model.base_model is model:
        return f"{model.config.model_type} is more than a text model with an output layer"
    if recorded_arrangement(kind) is not Arrangement.packed or not can_choose_attention(model):
        return f"{kind} cannot be packed"
    if rope_limit(text) is not None:
        return "position embeddings depend on the longest sequence"
    if noise := _noise(model):
        return f"{noise} is on"
    if len(set((getattr(model, "hf_device_map", None) or {}).values())) > 1:
        return "the model's layers are on several devices"
    return ""


def _noise(model: PreTrainedModel) -> str:
    """Return the name of what makes training random; empty if nothing does."""
    for module in model.modules():
        if isinstance(module, nn.Dropout) and module.p > 0:
            return "dropout"
        for name, value in vars(module).items():
            if isinstance(value, float) and value > 0 and any(part in name for part in NOISES):
                return str(name)
    return ""
