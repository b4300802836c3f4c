"""Times, noise, dropped labels and lengths of training rows, drawn on the CPU from generators of the row.

They are seeded by (noise seed, place of the row in the run), so that what is drawn for a row depends neither on the
number of processes, nor on accumulation, nor on the device, nor on the global random state.

t = 0 is clean, t = 1 is noise. Shapes: B batch, L length.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..diffusion.process import NoiseProcess

# Second word of the seed: independent streams of random numbers.
TRAIN_ROW, TRAIN_STEP, EVAL_ROW, EVAL_SHIFT, TRAIN_LENGTH, TRAIN_LABEL = range(6)


def generator_of(seed: int, stream: int, index: int) -> torch.Generator:
    """Generator of one row, or of one step, independent of all others.

    Args:
        seed: Noise seed of the run.
        stream: `TRAIN_ROW` or another of these constants.
        index: Place of the row, or number of the step, in the run.
    """
    state = np.random.SeedSequence((seed, stream, index)).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]))


def corrupt_rows(
    process: NoiseProcess, x_0: Tensor, noise_mask: Tensor, t: Tensor, generators: Sequence[torch.Generator]
) -> Tensor:
    """z_t (B, L) at times t (B,), each row drawn from its own generator; prompt and padding are not changed.

    Args:
        process: The noise.
        x_0: Clean ids (B, L). Not modified.
        noise_mask: True where noise may fall, (B, L) bool.
        t: Times (B,), float64: near t = 0, 1 - alpha_t, which divides the loss, loses its digits in float32.
        generators: One per row.
    """
    z_t = x_0.clone()
    for row, (generator, free) in enumerate(zip(generators, noise_mask, strict=True)):
        # Only free positions are drawn: the noise must not depend on the padding, which depends on the batch.
        z_t[row, free] = process.corrupt(x_0[row : row + 1, free], t[row : row + 1], generator)[0]
    return z_t


class RowNoise:
    """Draws times, noise and random lengths of training rows.

    Args:
        process: The noise.
        seed: Noise seed of the run.
        t_eps: Times are (1 - t_eps) t + t_eps, t in [0, 1].
        stratified: One row in each of the G equal intervals of time of a global batch of G rows, in random order;
            otherwise rows are independent.
        length_probability: Probability that all rows of a step are cut to one random length.
    """

    def __init__(
        self,
        process: NoiseProcess,
        seed: int,
        t_eps: float = 0.0,
        stratified: bool = False,
        length_probability: float = 0.0,
    ):
        self.process, self.seed, self.t_eps = process, seed, t_eps
        self.stratified, self.length_probability = stratified, length_probability
        self._strata: tuple[tuple[int, int, int], Tensor] | None = None

    def draw(self, x_0: Tensor, noise_mask: Tensor, indices: Sequence[int], global_batch: int) -> tuple[Tensor, Tensor]:
        """Times and noise of rows.

        Args:
            x_0: Clean ids (B, L).
            noise_mask: True where noise may fall, (B, L) bool.
            indices: Places of the rows in the run.
            global_batch: Rows of an optimizer step, of all processes.

        Returns:
            z_t (B, L) and t (B,), float64.
        """
        generators = [generator_of(self.seed, TRAIN_ROW, index) for index in indices]
        t = torch.stack([torch.rand((), generator=generator, dtype=torch.float64) for generator in generators])
        if self.stratified:
            strata = [self._stratum(*divmod(index, global_batch), global_batch) for index in indices]
            t = (torch.tensor(strata, dtype=torch.float64) + t) / global_batch
        t = (1 - self.t_eps) * t + self.t_eps
        return corrupt_rows(self.process, x_0, noise_mask, t, generators), t

    def _stratum(self, step: int, place: int, global_batch: int) -> int:
        key = (self.seed, step, global_batch)
        if self._strata is None or self._strata[0] != key:
            generator = generator_of(self.seed, TRAIN_STEP, step)
            self._strata = (key, torch.randperm(global_batch, generator=generator))
        return int(self._strata[1][place])

    def drop_labels(self, labels: Tensor, indices: Sequence[int], probability: float, null: int) -> Tensor:
        """Labels (B,) with some replaced by the null class; the noise of the rows does not depend on it.

        Args:
            labels: Class labels (B,). Not modified.
            indices: Places of the rows in the run.
            probability: Of dropping the label of a row.
            null: Label of the null class.
        """
        if not probability:
            return labels
        generators = [generator_of(self.seed, TRAIN_LABEL, index) for index in indices]
        dropped = torch.stack([torch.rand((), generator=generator) < probability for generator in generators])
        return labels.masked_fill(dropped, null)

    def length(self, step: int, longest: int) -> int | None:
        """Length to which the rows of a step are cut, uniform in 1..longest; None for whole rows."""
        generator = generator_of(self.seed, TRAIN_LENGTH, step)
        choice, place = torch.rand(2, generator=generator, dtype=torch.float64).tolist()
        return 1 + int(place * longest) if choice < self.length_probability else None
