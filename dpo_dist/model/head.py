"""The output layer as a log-prob head, and the packed model around it."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dpo_dist.config.schema import AttentionBackend
from dpo_dist.data.packing import PackedBatch
from dpo_dist.model.attention import PACKED, PackedAttention, packed_attention
from dpo_dist.model.layers import compile_layers
from dpo_dist.model.logit_changes import logit_change
from dpo_dist.model.rotary import RotaryByLength, rope_limits
from dpo_dist.model.sequence_parallel import ExchangedAttention, TokenExchange, TokenShare
from dpo_dist.objective.router_losses import routing_sums
from dpo_dist.objective.token_logps import UNCHANGED, LogitChange, Statistic, token_logps


class LogpHead(nn.Linear):
    """Output layer that returns the log-probs of targets and never the logits of all positions.

    All chunks are computed in one forward of the module that owns the weight: there ZeRO-3 gathers it.
    """

    change: LogitChange

    @classmethod
    def of(cls, linear: nn.Linear, change: LogitChange = UNCHANGED) -> "LogpHead":
        """Return a head that shares the parameters of `linear`, sharded or not.

        Args:
            linear: the output layer.
            change: what the model does to the layer's logits.
        """
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
    ) -> Tensor:
        """Return `objective.token_logps.token_logps` of `targets`; without targets the unchanged logits."""
        if targets is None:
            return super().forward(input)
        return token_logps(input, self.weight, self.bias, targets, statistics, self.change)


class PackedCausalLM(nn.Module):
    """Causal language model whose forward maps a packed batch to per-token log-probs.

    Args:
        causal_lm: a transformers model loaded with the packed attention interface.
        backend: the attention kernel.
        compiled: whether torch.compile compiles the decoder layers.
        sequence: the ranks that share the tokens of each batch; None: this rank computes all.

    Attributes:
        tiled: MLPs that compute in tiles of tokens.
    """

    def __init__(
        self,
        causal_lm: Any,
        backend: AttentionBackend,
        compiled: bool = False,
        sequence: TokenExchange | None = None,
    ):
        super().__init__()
        change = logit_change(causal_lm.config.get_text_config())
        causal_lm.set_output_embeddings(LogpHead.of(causal_lm.get_output_embeddings(), change))
        self.causal_lm = causal_lm
        self.backend = backend
        self.compiled = compiled
        self.sequence = sequence
        limits = rope_limits(causal_lm.config.get_text_config())
        self._rotary = None if limits is None else RotaryByLength(causal_lm, limits)
        self.tiled: list[nn.Module] = []
        if compiled:
            compile_layers(causal_lm)

    def forward(
        self, batch: PackedBatch, statistics: Sequence[Statistic] = (), *, with_routing: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Return `objective.token_logps.token_logps` of the targets of `batch`; collective in `sequence`.

        Args:
            batch: on the device of the model.
            statistics: of each target, beside its log-prob.
            with_routing: also return `objective.router_losses.routing_sums`, of a mixture of experts; not
                with `sequence`.
        """
        if self._rotary is not None:
            batch = self._rotary.arrange(batch)
        attention = packed_attention(batch.layout, self.backend, batch.input_ids.device)
        if self.sequence is None:
            logps, router_logits = self._logps(
                batch.input_ids,
                batch.position_ids,
                attention,
                batch.predictors,
                batch.targets,
                statistics,
                {"output_router_logits": True} if with_routing else {},
            )
            if not with_routing:
                return logps
            return logps, routing_sums(router_logits, batch.rows, self.causal_lm.num_experts_per_tok)
        tokens = len(batch.input_ids)
        share = TokenShare.of(self.sequence, tokens, batch.predictors)
        if self._rotary is not None:
            self._rotary.share(share.tokens)
        logps, _ = self._logps(
            batch.input_ids[share.tokens],
            batch.position_ids[share.tokens],
            ExchangedAttention(attention, self.sequence, tokens),
            share.predictors,
            batch.targets[share.targets],
            statistics,
            {},
        )
        return share.gather(logps)

    def _logps(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        attention: PackedAttention,
        predictors: Tensor,
        targets: Tensor,
        statistics: Sequence[Statistic],
        options: dict[str, bool],
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return `token_logps`, and the logits of the routers if `options` ask for them."""
        outputs = _body(self.causal_lm)(
            input_ids=input_ids[None],
            # Of ones: without it transformers would look for packed sequences itself, by their positions.
            attention_mask=torch.ones_like(input_ids[None]),
            position_ids=position_ids[None],
            use_cache=False,
            packed=attention,
            packed_positions=position_ids,
            **options,
        )
        predicting = outputs.last_hidden_state[0].index_select(0, predictors)
        logps: Tensor = self.causal_lm.get_output_embeddings()(
            predicting, targets=targets, statistics=statistics
        )
        return logps, outputs.router_logits if options else ()

    @contextlib.contextmanager
    def unpacked(self) -> Iterator[Any]:
        """Yield the transformers model as it computes logits of padded batches, with a cache, uncompiled."""
        defaults = self.causal_lm.generation_config
        if self._rotary is not None:
            self._rotary.release()
        self.causal_lm.set_attn_implementation("sdpa" if self.causal_lm._supports_sdpa else "eager")
        try:
            with torch.compiler.set_stance("force_eager"):
                yield self.causal_lm
        finally:
            self.causal_lm.set_attn_implementation(PACKED)
            self.causal_lm.generation_config = defaults


def _body(causal_lm: Any) -> Any:
    """Return the part of a transformers model that computes the last hidden states."""
    body = causal_lm.base_model
    return causal_lm.model if body is causal_lm else body  # Llama 4 gives its body no prefix
