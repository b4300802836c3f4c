"""Ancestral sampling: exact reverse diffusion along the schedule (Eq. 11).

t = 0 is clean, t = 1 is noise. Shapes: B batch, T whole length, M positions asked for, N vocabulary.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
from torch import Tensor

from ..diffusion.categorical import masked_logits
from ..diffusion.checks import check_positive
from ..diffusion.noise import NoiseKernel
from ..diffusion.reverse import begin_step, finish_step, stationary_step
from ..diffusion.schedules import Schedule
from .canvas import Canvas
from .sampler import Request, Sampler


class AncestralSampler(Sampler):
    """Exact reverse diffusion: a draw from the prior, then `steps` draws from Eq. 11 along the schedule.

    The times are i / steps, the last step ends at alpha = 1: no [MASK] is left when k < 1, no noise at any k.

    Args:
        kernel: Noise kernel with the model's N, k and mask token.
        schedule: alpha_t.
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
        kernel: NoiseKernel,
        schedule: Schedule,
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
                f"temperature={temperature} must be positive for sampler='ancestral': it draws from the model's "
                "distribution; for greedy text use sampler='confidence'."
            )
        self.kernel, self.schedule, self.steps = kernel, schedule, steps
        self.start, self.length = start, length
        self.temperature, self.warp, self.generator = temperature, warp, generator

    def block(self, i: int) -> tuple[int, int]:
        return self.start, self.start + self.length

    def begin(self, ids: Tensor, generated: Tensor, holes: Tensor | None = None) -> Canvas:
        """The positions that may change hold a draw from the prior; `holes` mean nothing here."""
        prior = self.kernel.sample_prior(tuple(ids.shape), self.generator, ids.device)
        nothing = torch.zeros_like(generated)
        zeros = torch.zeros_like(ids[:, 0])
        return Canvas(torch.where(generated, prior, ids), nothing, generated, zeros, zeros, zeros.bool())

    def request(self, canvas: Canvas, i: int) -> Request:
        """Draws all of the step that does not depend on p, and asks for the positions where p decides.

        Late in a long chain these are few: a token that stays whatever p is needs no logits, nor does a [MASK] that
        stays one.
        """
        draw = begin_step(canvas.ids, stationary_step(canvas.ids, *self._rates(i, canvas), self.kernel), self.generator)
        draw = replace(
            draw, most=torch.where(canvas.generated, draw.most, 0.0), needs_p=draw.needs_p & canvas.generated
        )
        return Request(i, draw.needs_p, draw)

    def step(self, canvas: Canvas, logits: Iterable[Tensor], request: Request) -> Canvas:
        """One exact draw from q(z_s | z_t, p), s = t - 1 / steps, at the generated positions."""
        z_s = finish_step(request.draw, map(self._tempered, logits), self.generator)
        return self._moved(canvas, z_s)

    def _rates(self, i: int, canvas: Canvas) -> tuple[Tensor, Tensor]:
        """alpha_s and alpha_t of step `i`, (1, 1) float64."""
        times = torch.tensor([1 - (i + 1) / self.steps, 1 - i / self.steps], dtype=torch.float64)
        alpha, _ = self.schedule(times.to(canvas.ids.device))
        return alpha[0].view(1, 1), alpha[1].view(1, 1)

    def _moved(self, canvas: Canvas, z_s: Tensor) -> Canvas:
        special = torch.zeros_like(canvas.generated)
        for token_id in self.kernel.absorbing_ids:
            special |= (canvas.ids == token_id) | (z_s == token_id)
        edits = ((z_s != canvas.ids) & ~special).sum(-1)
        return replace(canvas, ids=z_s, num_edits=canvas.num_edits + edits)

    def _tempered(self, logits: Tensor) -> Tensor:
        if self.temperature == 1 and self.warp is None:
            return logits
        logits = masked_logits(logits, self.kernel.absorbing_ids) / self.temperature
        return logits if self.warp is None else self.warp(logits)
