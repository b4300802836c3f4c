"""NELBO of held-out rows: fixed times and noise, and the standard error.

NELBO and standard errors are in nats per token. t = 0 is clean, t = 1 is noise. Shapes: B batch, L length.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ..diffusion.process import NoiseProcess
from .row_noise import EVAL_ROW, EVAL_SHIFT, corrupt_rows, generator_of

if TYPE_CHECKING:
    from transformers.trainer_utils import EvalPrediction  # imports peft, and with it bitsandbytes


def evaluation_noise(
    process: NoiseProcess,
    seed: int,
    x_0: Tensor,
    noise_mask: Tensor,
    indices: Sequence[int],
    sample: int,
    samples: int,
) -> tuple[Tensor, Tensor]:
    """Times stratified over (0, 1] within a row and across rows, and the noise at these times.

    Sample j of row i has t = 1 - (j + v_i) / S with v the van der Corput sequence, shifted by a random number that
    depends on the seed alone: any number of rows covers time evenly, and the estimate is unbiased.

    Args:
        process: The noise.
        seed: Noise seed of the run.
        x_0: Clean ids (B, L).
        noise_mask: True where noise may fall, (B, L) bool.
        indices: Places of the rows in the data.
        sample: j.
        samples: S, samples per row.

    Returns:
        z_t (B, L) and t (B,), float64.
    """
    shift = torch.rand((), generator=generator_of(seed, EVAL_SHIFT, 0), dtype=torch.float64)
    v = torch.tensor([_van_der_corput(index) for index in indices], dtype=torch.float64)
    t = 1 - (sample + (v + shift) % 1) / samples
    generators = [generator_of(seed, EVAL_ROW, index * samples + sample) for index in indices]
    return corrupt_rows(process, x_0, noise_mask, t, generators), t


def _van_der_corput(index: int) -> float:
    """Bits of `index` mirrored at the binary point: 0, 1/2, 1/4, 3/4, 1/8, ..."""
    return int(f"{index:b}"[::-1], 2) / 2 ** index.bit_length() if index else 0.0


def nelbo_of_sums(
    rows: float, nats: float, tokens: float, nats_2: float, both: float, tokens_2: float
) -> dict[str, float]:
    """NELBO as a ratio estimate over rows, its standard error, and both for the perplexity (delta method).

    Args:
        rows: Number of rows.
        nats, tokens: Sums over rows of a row's loss in nats and of its tokens.
        nats_2, both, tokens_2: Sums over rows of nats^2, nats tokens, tokens^2.

    Returns:
        `nelbo`, `perplexity`; with two rows or more also `nelbo_standard_error`, `perplexity_standard_error`.
    """
    nelbo = nats / tokens
    perplexity = math.exp(min(nelbo, 700.0))
    figures = {"nelbo": nelbo, "perplexity": perplexity}
    if rows > 1:
        residuals = max(nats_2 - 2 * nelbo * both + nelbo**2 * tokens_2, 0.0)
        error = math.sqrt(residuals * rows / (rows - 1)) / tokens
        figures |= {"nelbo_standard_error": error, "perplexity_standard_error": perplexity * error}
    return figures


def nelbo_metrics(prediction: "EvalPrediction") -> dict[str, float]:
    """Metrics of an evaluation from sums per row: `nelbo_of_sums` with the NELBO called `loss`, and `tokens`.

    Args:
        prediction: `predictions` nats per row, `label_ids` tokens per row.
    """
    nats, tokens = (np.asarray(x, dtype=np.float64) for x in (prediction.predictions, prediction.label_ids))
    products = (nats * nats, nats * tokens, tokens * tokens)
    sums = (float(x.sum()) for x in (nats, tokens, *products))
    figures = nelbo_of_sums(len(nats), *sums)
    return {name.replace("nelbo", "loss"): value for name, value in figures.items()} | {"tokens": float(tokens.sum())}
