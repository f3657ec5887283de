"""AdamW in 6 bytes a weight: the weight and both of its moments in bf16, rounded up or down by chance.

bf16 has 8 bits, so rounding to the nearest loses every update below 2^-9 of a weight, and the decay of the
second moment. A value that is rounded up with the probability of its remainder is right in the mean. The
random bits are a function of seed, step, name of the weight and number of the element in the whole weight,
not of a generator with a state: from equal gradients weights are equal to the bit for any number of
processes and any sharding, and after any resume.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

if TYPE_CHECKING:  # a plan without a device needs no DeepSpeed
    from dpo_dist.distributed.deepspeed_internals import Range

FIRST = "exp_avg"
SECOND = "exp_avg_sq"
STEP = "step"
# Elements of a weight that share a key, and are updated together. With another number, or another text of the
# key, a checkpoint would be continued by another chance.
_PIECE = 2**22
_IN_CACHE = 2**15  # elements that a CPU updates at a time: half of the time of whole pieces
_LOW_BITS = 2**16 - 1
# A compiled update has the bits of the other one: Triton fuses no operations, and divides as IEEE 754 says.
_EXACT: dict[str, Any] = {"emulate_precision_casts": True, "eager_numerics.division_rounding": True}


class ChanceKeys(NamedTuple):
    """Four integers of 32 bits, with a sign, that choose the random bits of a piece of a weight."""

    of_weight: tuple[int, int]
    of_second: tuple[int, int]


def keys_of(seed: int, purpose: str, name: str, piece: int) -> ChanceKeys:
    """Return the keys of a piece of a weight, by its number; `purpose` is the step, or another use."""
    text = f"{seed} {purpose} {piece} {name}".encode()
    digest = hashlib.blake2b(text, digest_size=16).digest()
    a, b, c, d = (int.from_bytes(digest[i : i + 4], "little", signed=True) for i in range(0, 16, 4))
    return ChanceKeys((a, b), (c, d))


def random_bits(elements: Tensor, keys: tuple[int, int]) -> Tensor:
    """Return 32 random bits for each number of an element in its piece; both are int32."""
    first, second = keys
    return _mixed(_mixed(elements ^ first).add_(second))


def _mixed(bits: Tensor) -> Tensor:
    """Mix the bits of int32 numbers in place, one to one: the last part of MurmurHash3."""
    # A shift of int32 copies the sign, which the mask removes.
    bits ^= (bits >> 16) & _LOW_BITS
    bits *= -0x7A143595
    bits ^= (bits >> 13) & (2**19 - 1)
    bits *= -0x3D4D51CB
    bits ^= (bits >> 16) & _LOW_BITS
    return bits


def rounded(exact: Tensor, bits: Tensor) -> Tensor:
    """Return float32 values in bf16: the neighbour towards 0, or the other one by the low 16 of `bits`."""
    # Neighbours in bf16 are 2^16 apart in the bits of float32, also where the exponent changes.
    raised = exact.view(torch.int32) + (bits & _LOW_BITS)
    return (raised & ~_LOW_BITS).view(torch.float32).to(torch.bfloat16)


@dataclass(frozen=True)
class _Piece:
    """Elements of piece `number` of a weight, from its element `place`; in a range they begin at `offset`."""

    number: int
    place: int
    offset: int
    length: int

    def elements(self, device: torch.device) -> Tensor:
        """Return the numbers of the elements in the piece, an int32."""
        return torch.arange(self.place, self.place + self.length, dtype=torch.int32, device=device)


def _pieces(first: int, length: int, device: torch.device) -> Iterator[_Piece]:
    """Yield the pieces of a range of a weight that begins at its element `first`, on a CPU in parts."""
    most = _IN_CACHE if device.type == "cpu" else _PIECE
    offset = 0
    while offset < length:
        number, place = divmod(first + offset, _PIECE)
        count = min(_PIECE - place, length - offset, most)
        yield _Piece(number, place, offset, count)
        offset += count


def round_by_chance(exact: Tensor, seed: int, purpose: str, name: str, first: int = 0) -> Tensor:
    """Return float32 values in bf16, by chance: those of the weight `name` from its element `first`."""
    values = exact.contiguous().view(-1)
    result = torch.empty_like(values, dtype=torch.bfloat16)
    for piece in _pieces(first, len(values), values.device):
        keys = keys_of(seed, purpose, name, piece.number)
        bits = random_bits(piece.elements(values.device), keys.of_weight)
        part = values.narrow(0, piece.offset, piece.length)
        result.narrow(0, piece.offset, piece.length).copy_(rounded(part, bits))
    return result.view(exact.shape)


class UpdateRates(NamedTuple):
    """The numbers of an update of AdamW; `bias` are 1 less the powers of the decay rates."""

    lr: float
    weight_decay: float
    betas: tuple[float, float]
    bias: tuple[float, float]
    eps: float


def update(tensors: Sequence[Tensor], elements: Tensor, keys: ChanceKeys, rates: UpdateRates) -> None:
    """Update weights and both moments in place, by gradients.

    Args:
        tensors: weights, gradients, first and second moments, bf16 [elements].
        elements: their numbers in the piece, int32 [elements].
        keys: of the piece.
        rates: of the step.
    """
    # Each operation rounds once, as IEEE 754 says. A fused one (`addcmul`, `lerp`, `add` with `alpha`) may
    # round less often, and torch computes the end of a tensor by other code than its middle: the value of a
    # weight would depend on the shard that it is in.
    weight, gradient, first, second = tensors
    beta1, beta2 = rates.betas
    bias1, bias2 = rates.bias
    exact_gradient = gradient.float()
    exact_first = first.float().mul_(beta1).add_(exact_gradient * (1 - beta1))
    exact_second = second.float().mul_(beta2).add_(exact_gradient.square().mul_(1 - beta2))
    # Not divided: by a number, CUDA multiplies with its reciprocal, and a CPU divides.
    scale = exact_second.mul(1 / bias2).sqrt_().add_(rates.eps)
    move = exact_first.div(scale).mul_(rates.lr / bias1)
    exact = weight.float().mul_(1 - rates.lr * rates.weight_decay).sub_(move)
    bits = random_bits(elements, keys.of_weight)
    weight.copy_(rounded(exact, bits))
    first.copy_(rounded(exact_first, bits >> 16))
    second.copy_(rounded(exact_second, random_bits(elements, keys.of_second)))


class AdamWBF16(torch.optim.Optimizer):
    """AdamW on flat bf16 tensors, the parts of weights that DeepSpeed gives a rank.

    `ranges` maps each flat tensor to the weights in it, `names` has their names. What is in no range is
    padding, which stays as it is. `compiles`: the update is one kernel, in place of 45.
    """

    ranges: "Mapping[Tensor, Sequence[Range]]"
    names: Mapping[nn.Parameter, str]

    def __init__(
        self,
        groups: Any,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        seed: int,
        compiles: bool = False,
    ):
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})
        self._seed = seed
        self._update = torch.compile(update, dynamic=True, options=_EXACT) if compiles else update

    @torch.no_grad()
    def step(self, _closure: Any = None) -> None:  # type: ignore[override]
        """Update all weights from their gradients, which are already clipped."""
        for group in self.param_groups:
            for flat in group["params"]:
                self._update_flat(flat, group)

    def _update_flat(self, flat: Tensor, group: Mapping[str, Any]) -> None:
        assert flat.grad is not None, "DeepSpeed sets the gradient before each step"
        state = self.state[flat]
        if not state:
            state[STEP] = 0
            state[FIRST] = torch.zeros_like(flat, requires_grad=False)
            state[SECOND] = torch.zeros_like(flat, requires_grad=False)
        state[STEP] += 1
        step = state[STEP]
        beta1, beta2 = group["betas"]
        bias = 1 - beta1**step, 1 - beta2**step
        rates = UpdateRates(group["lr"], group["weight_decay"], (beta1, beta2), bias, group["eps"])
        all_tensors = flat.detach(), flat.grad, state[FIRST], state[SECOND]
        for weight, start, first, length in self.ranges[flat]:
            name = self.names[weight]
            for piece in _pieces(first, length, flat.device):
                tensors = [tensor.narrow(0, start + piece.offset, piece.length) for tensor in all_tensors]
                keys = keys_of(self._seed, str(step), name, piece.number)
                self._update(tensors, piece.elements(flat.device), keys, rates)
