"""Ancestral sampling: exact reverse diffusion along the schedule (Eq. 11).

t = 0 is clean, t = 1 is noise. Shapes: B batch, T total length, M requested positions, N vocabulary.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..diffusion.categorical import masked_logits
from ..diffusion.checks import check_positive
from ..diffusion.process import NoiseProcess
from ..diffusion.reverse import begin_step, finish_step
from .canvas import Canvas
from .sampler import Request, Sampler


class AncestralSampler(Sampler):
    """Exact reverse diffusion: a draw from the prior, then `steps` draws from Eq. 11.

    The times are i / steps, and the last step ends at alpha = 1, so that no noise is left.

    Args:
        process: The noise, over the model's N rows.
        steps: Reverse steps, one forward pass each.
        start, length: The answer is the columns [start, start + length).
        temperature: p = softmax(logits / temperature); 1 is the model's own distribution.
        warp: Filter of the tempered logits, (M, N) to (M, N), e.g. top-k or top-p.
        generator: Source of randomness.

    Raises:
        ValueError: If `steps`, `length` or `temperature` is not positive.
    """

    def __init__(
        self,
        process: NoiseProcess,
        steps: int,
        start: int,
        length: int,
        temperature: float = 1.0,
        warp: Callable[[Tensor], Tensor] | None = None,
        generator: torch.Generator | None = None,
    ):
        check_positive(steps=steps, max_new_tokens=length)
        if temperature <= 0:
            raise ValueError(
                f"temperature={temperature} must be positive for sampler='ancestral', which samples from the model's "
                "distribution; for greedy decoding use sampler='confidence'."
            )
        self.process, self.steps = process, steps
        self.start, self.length = start, length
        self.temperature, self.warp, self.generator = temperature, warp, generator

    def block(self, i: int) -> tuple[int, int]:
        return self.start, self.start + self.length

    def begin(self, ids: Tensor, generated: Tensor, holes: Tensor | None = None) -> Canvas:
        """The positions that may change hold a draw from the prior; `holes` is ignored."""
        prior = self._prior(tuple(ids.shape), ids.device)
        no_holes = torch.zeros_like(generated)
        zeros = torch.zeros_like(ids[:, 0])
        return Canvas(torch.where(generated, prior, ids), no_holes, generated, zeros, zeros, zeros.bool())

    def _prior(self, shape: tuple[int, ...], device: torch.device) -> Tensor:
        return self.process.sample_prior(shape, self.generator, device)

    def request(self, canvas: Canvas, i: int) -> Request:
        """Draws all random numbers that do not depend on p, and requests logits only where z_s depends on p.

        In a long chain these positions are few.
        """
        s, t = self.times(i)
        step = self.process.reverse_step(canvas.ids, s.to(canvas.ids.device), t.to(canvas.ids.device))
        draw = begin_step(canvas.ids, step, self.generator)
        draw = replace(
            draw,
            leave_bound=torch.where(canvas.generated, draw.leave_bound, 0.0),
            needs_p=draw.needs_p & canvas.generated,
        )
        return Request(i, mask=draw.needs_p, t=t.item(), draw=draw)

    def step(self, canvas: Canvas, logits: Iterable[Tensor], request: Request) -> Canvas:
        """One exact draw from q(z_s | z_t, p), s = t - 1 / steps, at the generated positions."""
        absorbing_ids = request.draw.step.noise_s.absorbing_ids
        tempered = (self._tempered(chunk, absorbing_ids) for chunk in logits)
        return self._with_ids(canvas, finish_step(request.draw, tempered, self.generator), absorbing_ids)

    def times(self, i: int) -> tuple[Tensor, Tensor]:
        """s and t of step `i`, (1, 1) each, float64, on the CPU."""
        return tuple(torch.tensor([[1 - n / self.steps]], dtype=torch.float64) for n in (i + 1, i))

    def _with_ids(self, canvas: Canvas, z_s: Tensor, absorbing_ids: Sequence[int]) -> Canvas:
        special = torch.zeros_like(canvas.generated)
        for token_id in absorbing_ids:
            special |= (canvas.ids == token_id) | (z_s == token_id)
        edits = ((z_s != canvas.ids) & ~special).sum(-1)
        return replace(canvas, ids=z_s, num_edits=canvas.num_edits + edits)

    def _tempered(self, logits: Tensor, absorbing_ids: Sequence[int]) -> Tensor:
        if self.temperature == 1 and self.warp is None:
            return logits
        logits = masked_logits(logits, absorbing_ids) / self.temperature
        return logits if self.warp is None else self.warp(logits)
