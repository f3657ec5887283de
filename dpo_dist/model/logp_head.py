"""The output layer as a log-prob head: no logits of all positions."""

from collections.abc import Sequence

from torch import Tensor, nn

from dpo_dist.objective.token_logps import UNCHANGED, LogitChange, Statistic, float32_logits, token_logps


class LogpHead(nn.Linear):
    """Output layer that returns the log-probs of targets and never the logits of all positions.

    All chunks are computed in one forward of the module that owns the weight: there ZeRO-3 gathers it.

    Attributes:
        is_precise: whether logits are float32; they have the dtype of the model otherwise.
    """

    is_precise = False
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
        if targets is not None:
            return token_logps(input, self.weight, self.bias, targets, statistics, self.change)
        if self.is_precise:
            return float32_logits(input, self.weight, self.bias)
        return super().forward(input)
