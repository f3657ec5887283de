"""Muon for matrices and AdamW for all other weights, as one optimizer inside of DeepSpeed's."""

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dpo_dist.model.flops import numbers_of_experts
from dpo_dist.model.layers import output_layer

if TYPE_CHECKING:  # a plan without a device needs no DeepSpeed
    from dpo_dist.distributed.deepspeed_internals import Range

MOMENTUM = "momentum_buffer"  # the state of Muon, of the shape of the weight
MATRICES = "is_of_matrices"
"""Marks the parameter group that Muon updates."""


def matrices_of(causal_lm: Any) -> set[nn.Parameter]:
    """Return the trained matrices, without embeddings and the output layer.

    Stacked experts are none, nor are an adapter's matrices on them, which are those of all experts in one.
    """
    tables = {module.weight for module in causal_lm.modules() if isinstance(module, nn.Embedding)}
    output = output_layer(causal_lm)
    if output is not None:
        tables |= set(output.parameters())
    of_experts = numbers_of_experts(causal_lm)
    matrices = set()
    for weight in causal_lm.parameters():
        is_of_layer = weight not in tables and id(weight) not in of_experts
        if weight.requires_grad and weight.ndim == 2 and is_of_layer:
            matrices.add(weight)
    return matrices


class MuonAndAdamW(torch.optim.AdamW):
    """AdamW, with Muon for the group of `MATRICES` (arXiv 2502.16982: updates as large as those of AdamW).

    DeepSpeed replaces the weights of each group by one flat tensor, this rank's part of all of them;
    `ranges` maps this tensor to the weights in it.
    """

    ranges: "Mapping[Tensor, Sequence[Range]]"

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update all weights from their gradients, which are already clipped; collective."""
        groups = self.param_groups
        self.param_groups = [group for group in groups if not group[MATRICES]]
        super().step(closure)
        self.param_groups = groups
        for group in groups:
            if group[MATRICES]:
                self._update_matrices(group["params"][0], group["lr"], group["weight_decay"])

    def has_momentum(self, flat: Tensor) -> bool:
        """Return whether Muon updates a flat tensor, which then has a momentum in place of two moments."""
        return any(group[MATRICES] and group["params"][0] is flat for group in self.param_groups)

    def _update_matrices(self, flat: Tensor, lr: float, weight_decay: float) -> None:
        state = self.state[flat]
        if not state:
            state |= {"step": torch.zeros(()), MOMENTUM: torch.zeros_like(flat, requires_grad=False)}
        state["step"] += 1
        assert flat.grad is not None, "DeepSpeed sets the gradient before each step"
        tensors = [flat.detach(), flat.grad, state[MOMENTUM]]
        ranges = self.ranges[flat]
        joined = _join(tensors, ranges)
        momenta = {}
        for weight, start, _, length in ranges:
            parts = joined.get(weight) or [tensor.narrow(0, start, length) for tensor in tensors]
            matrix, matrix.grad, momentum = (part.view(weight.shape) for part in parts)
            momenta[matrix] = {MOMENTUM: momentum}
        if momenta:  # else this rank's part is only padding
            muon: Any = torch.optim.Muon(momenta, lr, weight_decay, adjust_lr_fn="match_rms_adamw")
            muon.state.update(momenta)
            muon.step()
        for weight, start, first, length in ranges:
            for tensor, matrix_values in zip(tensors, joined.get(weight, ()), strict=False):
                tensor.narrow(0, start, length).copy_(matrix_values.narrow(0, first, length))


def _join(tensors: Sequence[Tensor], ranges: "Sequence[Range]") -> dict[nn.Parameter, list[Tensor]]:
    """Return the whole of each matrix that is cut over ranks, of each of the flat `tensors`; collective.

    Ranks have equal parts, one after the other, of all matrices in a row. Two ranks share at most one
    matrix, unless they are the same.
    """
    # Only matrices that are cut travel, and only to ranks that have parts of them: most of a rank's part are
    # whole matrices, and to gather all of them would take the memory that ZeRO saves.
    rank = dist.get_rank()
    ranks = dist.get_world_size()
    size = tensors[0].numel()
    cut = [each for each in ranges if each[3] < each[0].numel()]
    sent = [tensors[0][:0]]
    to_send = [0] * ranks
    to_receive = [0] * ranks
    shares: list[tuple[nn.Parameter, int]] = []
    for other, (weight, start, first, length) in itertools.product(range(ranks), cut):
        begin = (rank - other) * size + start - first  # of the matrix, from the start of the other's part
        count = min(begin + weight.numel(), size) - max(begin, 0)
        if count > 0:
            shares.append((weight, count))
            sent += [tensor.narrow(0, start, length) for tensor in tensors]
            to_send[other] += len(tensors) * length
            to_receive[other] += len(tensors) * count
    received = tensors[0].new_empty(sum(to_receive))
    dist.all_to_all_single(received, torch.cat(sent), to_receive, to_send)
    pieces: dict[nn.Parameter, list[Tensor]] = {}
    for weight, count in shares:
        piece, received = received.tensor_split([len(tensors) * count])
        pieces.setdefault(weight, []).append(piece.view(len(tensors), count))
    return {weight: [*torch.cat(each, dim=1)] for weight, each in pieces.items()}
