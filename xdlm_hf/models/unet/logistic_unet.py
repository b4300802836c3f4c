"""Output layer of the pixel U-Net: a discretized logistic distribution of each value.

Shapes: V values, S bins of [-1, 1], N rows.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid, pad

from ...diffusion.checks import work_dtype

# Long before, one bin has all of the mass; far beyond, the inverse scale would overflow float32.
_LARGEST_LOG_SCALE = 40.0


class LogisticHead(nn.Module):
    """Mean and log-scale of a logistic distribution to the logits of its bins.

    Bin j is [-1 + j w, -1 + (j + 1) w] with w = 2 / S. With the inverse scale s = exp(2 - b),

        p_j ~ sigmoid(s (upper_j - mu)) - sigmoid(s (lower_j - mu))

    The difference is sigmoid(u) sigmoid(-l) (1 - e^-(u - l)), where u - l = s w for all bins, so that up to a constant

        logit_j = log sigmoid(s (upper_j - mu)) + log sigmoid(-s (lower_j - mu))

    and nothing cancels.

    Args:
        num_values: V, the bins that have a row.
        num_bins: S.
        rows: N; those from V on, [MASK] among them, are -inf.
    """

    def __init__(self, num_values: int, num_bins: int, rows: int):
        super().__init__()
        self.num_values, self.num_bins, self.rows = num_values, num_bins, rows

    def forward(self, parameters: Tensor) -> Tensor:
        """Logits (..., N), float32 or wider, of (mu, b) (..., 2)."""
        mu, b = parameters.to(work_dtype(parameters)).unbind(-1)
        scale = (2 - b).clamp_max(_LARGEST_LOG_SCALE).exp()
        edges = torch.arange(self.num_values + 1, device=mu.device, dtype=mu.dtype) * (2 / self.num_bins) - 1
        x = scale[..., None] * (edges - mu[..., None])
        logits = logsigmoid(x[..., 1:]) + logsigmoid(-x[..., :-1])
        return pad(logits, (0, self.rows - self.num_values), value=-torch.inf)

    def extra_repr(self) -> str:
        return f"num_values={self.num_values}, num_bins={self.num_bins}, rows={self.rows}"
