"""RMS norm with a learned weight."""

from __future__ import annotations

from torch import Tensor, nn

from sgl.kernels.rms_norm import rms_norm
from sgl.models.layers.weights import Placement, Weight, whole


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float, placement: Placement) -> None:
        super().__init__()
        self.eps = eps
        self.tp = placement.tp
        weight_D = placement.empty(size).float()  # the norm is computed in float32 in any case
        self.weight = Weight(weight_D, 0, whole(size))

    def forward(self, x_TD: Tensor) -> Tensor:
        return rms_norm(x_TD, self.weight, self.eps)

    def add(self, stream_TD: Tensor, delta_TD: Tensor | None) -> Tensor:
        """Add every rank's `delta_TD` to the residual stream, in place; the norm of the sum.

        None: it is in the stream already.
        """
        if delta_TD is None:
            return self(stream_TD)
        return self.tp.add_rms_norm(stream_TD, delta_TD, self.weight, self.eps)
