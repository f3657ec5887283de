"""A causal language model that scores packed batches: packed, as padded rows, or row by row."""

import contextlib
import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dpo_dist.batching.costs import Arrangement
from dpo_dist.batching.pack import PackedBatch, PaddedRows, pack, padded_rows
from dpo_dist.batching.plan import consecutive_batches
from dpo_dist.config.schema import AttentionBackend, FusedLayers
from dpo_dist.data import Example
from dpo_dist.model.attention.kernels import PACKED, packed_attention
from dpo_dist.model.attention.ulysses import ExchangedAttention, TokenExchange, TokenShare
from dpo_dist.model.images import EncodedImages, ImageReader
from dpo_dist.model.layers import decoder_layers, gives_scores, output_layer, text_part
from dpo_dist.model.library_internals import (
    attention_name,
    can_choose_attention,
    fork_states,
    plain_attention,
    text_attention,
    whole_mask,
)
from dpo_dist.model.states import ForkedStates
from dpo_dist.objective.distillation import (
    SoftTargets,
    SparseRows,
    TeacherInputs,
    WholeDistributions,
    WholeTargets,
)
from dpo_dist.objective.router import routing_sums
from dpo_dist.objective.token_logps import (
    UNCHANGED,
    LogitChange,
    Statistic,
    changed_logits,
    float32_logits,
    logps_of_logits,
    rows_of_logits,
    teacher_rows,
    token_logps,
)

# Options of transformers' configurations. Dividing the output layer's input counts as dividing its logits.
_FACTORS = ("logit_scale", "lm_head_multiplier", "output_multiplier")
_DIVISORS = ("logits_scaling", "logits_mup_width_multiplier")
_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
# Architectures that multiply by the options in `_DIVISORS`.
_MULTIPLYING = {"hyperclovax"}


def logit_change(model_config: Any) -> LogitChange:
    """Return the scale and cap that a text model applies to its logits before softmax."""

    def numbers(names: Sequence[str]) -> list[float]:
        values = [getattr(model_config, name, None) for name in names]
        return [float(value) for value in values if isinstance(value, int | float) and value]

    factor = math.prod(numbers(_FACTORS))
    divisor = math.prod(numbers(_DIVISORS))
    scale = factor * divisor if model_config.model_type in _MULTIPLYING else factor / divisor
    return LogitChange(scale, min(numbers(_CAPS), default=None))


class LogpHead(nn.Linear):
    """Output layer that returns the log-probs of targets and never the logits of all positions.

    All chunks are computed in one forward of the module that owns the weight, where ZeRO-3 gathers it.
    """

    is_precise = False  # whether logits without targets are float32; otherwise they have the model's dtype
    change: LogitChange

    @classmethod
    def from_linear(cls, linear: nn.Linear, change: LogitChange) -> "LogpHead":
        """Return a head that shares the parameters of the output layer `linear`, sharded or not."""
        has_bias = linear.bias is not None
        head = cls(linear.in_features, linear.out_features, bias=has_bias, device="meta")
        head.weight = linear.weight
        if has_bias:
            head.bias = linear.bias
        head.change = change
        return head

    def forward(
        self,
        input: Tensor,  # noqa: A002  (nn.Linear's name)
        targets: Tensor | None = None,
        statistics: Sequence[Statistic] = (),
        soft: SoftTargets | WholeTargets | None = None,
        asked: TeacherInputs | None = None,
    ) -> Tensor:
        """Return `token_logps` of `targets`, or `teacher_rows` of what is `asked`, or else all logits."""
        if asked is not None:
            assert asked.uniforms is not None
            assert isinstance(asked.kept, SparseRows)
            return teacher_rows(input, self.weight, self.bias, asked.uniforms, asked.kept, self.change)
        if targets is not None:
            return token_logps(input, self.weight, self.bias, targets, statistics, self.change, soft)
        if self.is_precise:
            return float32_logits(input, self.weight, self.bias)
        return super().forward(input)


class ScoreHead(LogpHead):
    """Output layer of a reward model: returns the score at each target's place in place of a log-prob."""

    def forward(
        self,
        input: Tensor,  # noqa: A002  (nn.Linear's name)
        targets: Tensor | None = None,
        statistics: Sequence[Statistic] = (),
        soft: SoftTargets | WholeTargets | None = None,
        asked: TeacherInputs | None = None,
    ) -> Tensor:
        """Return float32 [targets]; without targets all logits. A score has no distribution."""
        assert not statistics
        assert soft is None
        assert asked is None
        if targets is None:
            return super().forward(input)
        return float32_logits(input, self.weight, self.bias)[:, 0]


class PackedCausalLM(nn.Module):
    """Causal language model whose forward maps a packed batch to per-token log-probs, or to scores.

    If the `arrangement` is packed, the transformers model calls packed attention by the kernel `backend`, and
    the ranks of `sequence` share the tokens of each batch. Log-probs are computed by the chunked head from
    the last hidden states, or from the model's `own_logits`. If it `reads_images`, batches may have images;
    the ranks of `sequence` are one then.
    """

    def __init__(
        self,
        causal_lm: Any,
        backend: AttentionBackend,
        fused: FusedLayers = FusedLayers.none,
        sequence: TokenExchange | None = None,
        arrangement: Arrangement = Arrangement.packed,
        *,
        reads_images: bool = False,
    ):
        super().__init__()
        self.causal_lm = causal_lm
        self.images = ImageReader(causal_lm) if reads_images else None
        self.backend = backend
        self.fused = fused
        self.sequence = sequence
        self._rope_limit = rope_limit(causal_lm.config.get_text_config())
        self.arrangement = arrangement
        self.is_generating = False
        self.exchanges_tokens = False  # with other ranks, which have other experts
        self.forks_states = fork_states(causal_lm)
        head = output_layer(causal_lm)
        self.gives_scores = gives_scores(causal_lm)
        # An output layer with its own forward may compute more than the product with its weight.
        if self.gives_scores:
            causal_lm.score = ScoreHead.from_linear(head, UNCHANGED)
        elif isinstance(head, nn.Linear) and type(head).forward is nn.Linear.forward:
            change = logit_change(causal_lm.config.get_text_config())
            causal_lm.set_output_embeddings(LogpHead.from_linear(head, change))
        self.own_logits = not self.has_chunked_head
        attention = attention_name(causal_lm)
        self._own_attention = plain_attention(causal_lm) if attention == PACKED else attention
        if fused is FusedLayers.compile:
            # Not whole layers: checkpointing is part of their forward, and prevents compilation.
            for layer in decoder_layers(causal_lm):
                for part in layer.children():
                    part.compile(dynamic=True)

    @property
    def body(self) -> Any:
        """Return the model without its output layer, or the whole model if it has no such part."""
        base = self.causal_lm.base_model
        if base is not self.causal_lm:
            return base
        return getattr(text_part(base), "model", base)  # Llama 4 gives its body no prefix

    @property
    def hidden_size(self) -> int:
        """Return the width of the hidden states; a model in parts (BLT) has the width of its last part."""
        config = self.causal_lm.config.get_text_config()
        head = output_layer(self.causal_lm)
        return int(getattr(config, "hidden_size", None) or head.in_features)

    @property
    def has_chunked_head(self) -> bool:
        """Whether the output layer is a single matrix after a separate body."""
        has_body = self.body is not self.causal_lm
        return has_body and bool(self._heads())

    def _heads(self) -> list[LogpHead]:
        """Return the output layer and its copies in adapters."""
        output = output_layer(self.causal_lm)
        return [] if output is None else [head for head in output.modules() if isinstance(head, LogpHead)]

    def can_pack(self, *, own_logits: bool) -> bool:
        """Return whether the model calls attention by transformers' interface and accepts positions."""
        names = {"attention_mask", "position_ids", "packed", "packed_positions"}
        accepted = accepted_inputs(self.causal_lm if own_logits else self.body, names)
        return accepted == names and can_choose_attention(self.causal_lm)

    def exceeds_rope_limit(self, longest: int) -> bool:
        """Return whether sequences of `longest` tokens need a forward per response (see `rope_limit`)."""
        return self._rope_limit is not None and longest > self._rope_limit

    def arrange_as_recorded(self, recorded: Arrangement, longest: int) -> None:
        """Set the arrangement recorded for the architecture, unless it is packed and the model cannot pack.

        `longest` is the longest prompt plus response, in tokens.
        """
        if self.exceeds_rope_limit(longest):
            recorded = Arrangement.single
        if recorded is not Arrangement.packed or self.can_pack(own_logits=self.own_logits):
            self.arrange(recorded, own_logits=self.own_logits)

    def arrange(self, arrangement: Arrangement, *, own_logits: bool) -> None:
        """Set how log-probs are computed from now on; the packed arrangement needs `can_pack`."""
        self.arrangement = arrangement
        self.own_logits = own_logits
        is_packed = arrangement is Arrangement.packed
        self._compute_by(PACKED if is_packed else self._own_attention, own_logits)

    def _compute_by(self, attention: str, is_precise: bool) -> None:
        if can_choose_attention(self.causal_lm):
            is_whole = self.images is None  # else the parts that read images keep their own attention
            chosen = attention if is_whole else text_attention(self.causal_lm, attention)
            self.causal_lm.set_attn_implementation(chosen)
        for head in self._heads():
            head.is_precise = is_precise

    def forward(
        self, batch: PackedBatch, statistics: Sequence[Statistic] = (), *, with_routing: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Return `objective.token_logps.token_logps` of the targets in `batch`.

        For the statistic `as_teacher` return the rows of the batch's `teacher`, float32 [width, targets], or
        the states that `logits_of_states` reads, of the model's dtype.
        The ranks of `sequence` call it together. `with_routing` also returns `objective.router.routing_sums`
        of a mixture of experts.
        """
        assert batch.images is None or (self.images is not None and self.sequence is None)
        encoded = None if self.images is None or self.images.is_own_forward else self.images.encode(batch)
        if self.arrangement is Arrangement.packed:
            return self._packed(batch, encoded, statistics, with_routing)
        pad_id = getattr(self.causal_lm.config.get_text_config(), "pad_token_id", None)
        if not isinstance(pad_id, int) or pad_id < 0:
            pad_id = 0
        rows = padded_rows(batch, pad_id)
        is_example = float(len(batch.keys) > 0)
        if self.arrangement is Arrangement.padded:
            inputs = {} if encoded is None else encoded.row_inputs(rows.input_ids, 0)
            outputs = self._call(with_routing, input_ids=rows.input_ids, **inputs).select(rows.predictors)
            weights = rows.is_token.flatten() * is_example
        else:
            outputs = self._one_by_one(rows, batch, encoded, with_routing)
            weights = outputs.predicting.new_full((sum(rows.lengths),), is_example, dtype=torch.float32)
        logps = self._logps(outputs.predicting, encoded, batch.targets, statistics, batch.teacher)
        return (logps, self._routing(outputs, weights)) if with_routing else logps

    def _packed(
        self,
        batch: PackedBatch,
        encoded: EncodedImages | None,
        statistics: Sequence[Statistic],
        with_routing: bool,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Compute `forward` on one packed sequence; each rank of `sequence` computes some of its tokens."""
        ids = batch.input_ids
        positions = batch.position_ids
        device = batch.input_ids.device
        runs = None if encoded is None else encoded.runs
        attention = packed_attention(batch.segments, self.backend, device, runs)
        predictors = batch.predictors
        targets = batch.targets
        repeats = batch.repeats
        teacher = batch.teacher
        share = None
        if self.sequence is not None:
            share = TokenShare.from_predictors(self.sequence, len(ids), batch.target_places[1], device)
            attention = ExchangedAttention(attention, self.sequence, len(ids))
            ids = ids[share.tokens]
            positions = positions[share.tokens]
            predictors = share.predictors
            targets = targets[share.targets]
            own_targets = share.targets
            teacher = None if teacher is None else teacher.map(lambda rows: rows[own_targets])
        inputs: dict[str, Any] = {"position_ids": positions[None]}
        if self.forks_states:
            inputs["packed_states"] = ForkedStates(batch.segments, device)
        if encoded is not None:
            inputs |= encoded.packed_inputs(device)
        outputs = self._call(
            with_routing,
            input_ids=ids[None],
            # All ones: without a mask, transformers itself would look for packed sequences by positions.
            attention_mask=whole_mask(ids[None]),
            packed=attention,
            packed_positions=positions,
            **inputs,
        ).select(predictors)
        logps = self._logps(outputs.predicting, encoded, targets, statistics, teacher)
        if share is None:
            return (logps, self._routing(outputs, repeats)) if with_routing else logps
        logps = share.gather(logps)
        return (logps, share.sum(self._routing(outputs, share.local(repeats)))) if with_routing else logps

    def _one_by_one(
        self, rows: PaddedRows, batch: PackedBatch, encoded: EncodedImages | None, with_routing: bool
    ) -> "_Outputs":
        """Return the outputs at the predictors, by one forward per row.

        A rank with fewer rows than `batch.forwards` adds forwards of two tokens, as in `dummy_batch`, so that
        all ranks gather the same weights (law L2). Their outputs are summed in float32: in fp16 the sum can
        be infinite, and 0 times infinity is NaN.
        """
        longest = rows.input_ids.shape[1]
        outputs = []
        routers = []
        targets = np.bincount(batch.target_places[0], minlength=len(rows.lengths)).tolist()
        for row, predictors in enumerate(torch.split(rows.predictors, targets)):
            ids = rows.input_ids[row : row + 1, : rows.lengths[row]]
            inputs = self._row_images(batch, encoded, ids, row)
            computed = self._row_outputs(ids, with_routing, **inputs)
            outputs.append(computed.select(predictors - row * longest).predicting)
            routers.append(computed.router_logits)
        predicting = torch.cat(outputs)
        for _ in range(batch.forwards - len(rows.lengths)):
            unused = self._row_outputs(rows.input_ids[:1, :2]).predicting
            predicting = predicting + (0.0 * unused.float().sum()).to(predicting.dtype)
        return _Outputs(predicting, tuple(map(torch.cat, zip(*routers, strict=True))))

    def _row_images(
        self, batch: PackedBatch, encoded: EncodedImages | None, input_ids: Tensor, row: int
    ) -> dict[str, Any]:
        """Return the inputs for the images of one row, [1, tokens]."""
        if encoded is not None:
            return encoded.row_inputs(input_ids, row)
        if self.images is None or batch.images is None:
            return {}
        inputs = {} if batch.images.is_dummy else batch.images.inputs
        return self.images.own_inputs(inputs, input_ids)

    def _row_outputs(self, input_ids: Tensor, with_routing: bool = False, **inputs: Any) -> "_Outputs":
        """Return the outputs of one row, [1, tokens]."""
        tokens = input_ids.shape[1]
        if self._rope_limit is not None:  # RoPE counts the response's last token, too, which is not an input
            reset_rope(self.causal_lm)
            input_ids = nn.functional.pad(input_ids, (0, 1))
        outputs = self._call(with_routing, input_ids=input_ids, **inputs)
        return _Outputs(outputs.predicting[:tokens], tuple(part[:tokens] for part in outputs.router_logits))

    def _call(self, with_routing: bool = False, **inputs: Any) -> "_Outputs":
        """Return the outputs of all tokens, row after row; only this method calls the model."""
        model = self.causal_lm if self.own_logits else self.body
        if with_routing:
            inputs["output_router_logits"] = True
        if accepted_inputs(model, {"use_cache"}):
            inputs["use_cache"] = False
        outputs = model(**inputs)
        predicting = outputs.logits if self.own_logits else outputs.last_hidden_state
        return _Outputs(predicting.flatten(0, 1), tuple(outputs.router_logits) if with_routing else ())

    def _logps(
        self,
        predicting: Tensor,
        encoded: EncodedImages | None,
        targets: Tensor,
        statistics: Sequence[Statistic],
        teacher: TeacherInputs | None,
    ) -> Tensor:
        """Return log-probs of `targets` from hidden states or logits `predicting`, [targets, width]."""
        if encoded is not None:
            predicting = encoded.with_dummy_gradient(predicting)
        head = output_layer(self.causal_lm)
        if "as_teacher" in statistics:
            assert teacher is not None
            assert teacher.uniforms is not None
            if isinstance(teacher.kept, WholeDistributions):
                return predicting.T
            if self.own_logits:
                return rows_of_logits(predicting, teacher.uniforms, teacher.kept).T
            rows: Tensor = head(predicting, asked=teacher)
            return rows.T
        soft = None
        if "of_teacher" in statistics:
            assert teacher is not None
            soft = teacher.wanted()
            statistics = [statistic for statistic in statistics if statistic != "of_teacher"]
        if self.own_logits:
            return logps_of_logits(predicting, targets, statistics, soft)
        logps: Tensor = head(predicting, targets=targets, statistics=statistics, soft=soft)
        return logps

    def logits_of_states(self, *, copied: bool) -> Callable[[Tensor], Tensor]:
        """Return the map of states [n, width] to float32 logits [n, ids] without a graph.

        It has `copied` weights where they are whole only now.
        """
        if self.own_logits:
            return Tensor.float
        head = output_layer(self.causal_lm)
        weight, bias = (
            parameter.detach().clone() if copied and parameter is not None else parameter
            for parameter in (head.weight, head.bias)
        )
        return partial(changed_logits, weight=weight, bias=bias, change=head.change)

    def _routing(self, outputs: "_Outputs", weights: Tensor) -> Tensor:
        """Return `routing_sums` of tokens that count `weights` times, float [tokens]."""
        visited = self.causal_lm.config.get_text_config().num_experts_per_tok
        return routing_sums(outputs.router_logits, weights, visited)

    @contextlib.contextmanager
    def unpacked(self) -> Iterator[Any]:
        """Yield the transformers model as itself: its own attention, padded batches, not compiled."""
        defaults = None if self.gives_scores else self.causal_lm.generation_config
        reset_rope(self.causal_lm)
        self._compute_by(self._own_attention, is_precise=False)
        self.is_generating = True
        try:
            with torch.compiler.set_stance("force_eager"):
                yield self.causal_lm
        finally:
            self.is_generating = False
            self.arrange(self.arrangement, own_logits=self.own_logits)
            if defaults is not None:  # generation may have changed them
                self.causal_lm.generation_config = defaults


def packed_logps(packed: PackedCausalLM, examples: Sequence[Example], budget: int) -> list[Tensor]:
    """Return the log-probs of every response, float32 [tokens]; a micro-batch has at most `budget` tokens.

    A longer example is a micro-batch of its own.
    """
    layout = [example.layout for example in examples]
    device = next(packed.parameters()).device
    logps = list[Tensor]()
    for part in consecutive_batches(layout, budget, packed.arrangement):
        members = examples[part.start : part.stop]
        no_keys = np.zeros((sum(len(example.responses) for example in members), 2), dtype=np.uint64)
        batch = pack(members, no_keys).to(device)
        logps += packed(batch).split(batch.response_tokens.tolist())
    return logps


@dataclass(frozen=True)
class _Outputs:
    """Hidden states or logits [tokens or targets, width], and router logits [tokens, experts]."""

    predicting: Tensor
    router_logits: tuple[Tensor, ...]

    def select(self, predictors: Tensor) -> "_Outputs":
        """Return only the hidden states or logits at `predictors`, int64 [targets]."""
        return _Outputs(self.predicting.index_select(0, predictors), self.router_logits)


def accepted_inputs(model: nn.Module, names: set[str]) -> set[str]:
    """Return the `names` that the forward of `model` accepts as keywords."""
    parameters = inspect.signature(model.forward).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    return names if takes_any else names & parameters.keys()


# `dynamic` and `longrope` RoPE choose one set of frequencies for a whole forward by its longest sequence, and
# `dynamic` also by earlier forwards. A model with sequences above the limit computes each response in a
# forward of its own, with the frequencies that a new model would choose for prompt and response.
_ORIGINAL = "original_inv_freq"


def rope_limit(model_config: Any) -> int | None:
    """Return the longest sequence, in tokens, with RoPE's short-sequence frequencies; None: no limit."""
    if not getattr(model_config, "rope_parameters", None):
        return None
    model_config.standardize_rope_params()  # the model does so, too: this may replace the original length
    parameters = model_config.rope_parameters
    by_layer_kind = [value for value in parameters.values() if isinstance(value, dict)]
    limits: list[int] = []
    for rope in by_layer_kind or [parameters]:
        rope_type = rope.get("rope_type", "default")
        if rope_type == "longrope":
            limits.append(rope["original_max_position_embeddings"])
        elif "dynamic" in rope_type:
            limits.append(model_config.max_position_embeddings)
    return min(limits, default=None)


def reset_rope(causal_lm: nn.Module) -> None:
    """Reset a model's rotary embeddings to the state before its first sequence."""
    for module in causal_lm.modules():
        # The original frequencies and those in use may be the same tensor.
        for name, original in list(module.named_buffers(recurse=False, remove_duplicate=False)):
            prefix = name.removesuffix(_ORIGINAL)
            longest = getattr(module, f"{prefix}max_seq_len_cached", None)
            if name.endswith(_ORIGINAL) and isinstance(longest, Tensor):  # frequencies of a long sequence
                setattr(module, f"{prefix}inv_freq", original)
                setattr(module, f"{prefix}max_seq_len_cached", module.original_max_seq_len)
