"""Strategies that turn noise into text, one class each with one `step`.

A sampler owns a `Canvas`, the whole sequence of every row. Each step has two halves: `request` says where it needs
logits, `step` uses them; in between the caller runs the network. t = 0 is clean, t = 1 is noise; N counts every row of
the output layer, [MASK] included.

Shapes: B batch, T whole length (prompt and answer), C columns or M positions asked for, N vocabulary. Everything is
vectorised over the batch: no step loops over rows or waits for the device because of one.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from numbers import Integral

import torch
from torch import Tensor

from .kernel import NoiseKernel, uniform
from .posterior import StepDraw, begin_step, finish_step, masked_logits, sample_categorical
from .schedules import Schedule

REMASKING = ("low_confidence", "random")


@dataclass(frozen=True)
class Canvas:
    """State of a generation, replaced (never modified) by each step."""

    ids: Tensor  # (B, T) int64
    holes: Tensor  # (B, T) bool, positions still to be filled
    generated: Tensor  # (B, T) bool, positions that generation owns: never prompt, padding or fixed text
    num_edits: Tensor  # (B,) int64, filled tokens that were replaced by another token


@dataclass(frozen=True)
class Request:
    """What step `i` needs of the network."""

    i: int
    positions: (
        Tensor  # (C,) columns, answered by logits (B, C, N); or (B, T) bool, answered by (M, N) in row-major order
    )
    draw: StepDraw | None = None  # what an ancestral step has drawn already


class Sampler(ABC):
    """Interface: `begin` a canvas, then for each step `request`, run the network, `step`."""

    steps: int
    block_ends: dict[int, int]  # step after which a block is final -> its end column

    @abstractmethod
    def begin(self, ids: Tensor, generated: Tensor) -> Canvas:
        """Canvas before the first step; `ids` are (B, T), `generated` (B, T) marks the positions to fill."""

    @abstractmethod
    def request(self, canvas: Canvas, i: int) -> Request:
        """First half of step `i`, from 0: where logits are needed."""

    @abstractmethod
    def step(self, canvas: Canvas, logits: Tensor, request: Request) -> Canvas:
        """Second half: the logits asked for in, the next canvas out."""


class ConfidenceSampler(Sampler):
    """LLaDA's low-confidence remasking with the refinement branch, Algorithm 1 of the paper.

    Each step fills the most confident of a block's holes, the same number per step (earlier steps take the remainder),
    and, for k > 0, replaces filled tokens that the model now disagrees with. Refinement has a budget over the whole
    generation: after a step at most floor(k / (1 - k) * tokens filled so far) edits, none at the first step; what finds
    no candidate carries over. k = 0 is LLaDA's sampler.

    Args:
        mask_token_id: m, what an unfilled position holds; never predicted.
        mixing_ratio: k in [0, 1], the refinement knob.
        steps: Forward passes in all; a multiple of the number of blocks, at most `length`.
        start, length: The answer is the columns [start, start + length).
        block_length: Columns that are filled together, left to right; divides `length`.
        temperature: 0 predicts the argmax; above it, a draw from softmax(logits / temperature).
        warp: Filter of the tempered logits before a draw, (M, N) to (M, N), e.g. top-k or top-p.
        remasking: "low_confidence", or "random" to choose the holes to fill at random.
        generator: Source of randomness.

    Raises:
        ValueError: If the lengths or steps do not fit each other (`check_blocks`), or an option is not known.
    """

    def __init__(
        self,
        mask_token_id: int,
        mixing_ratio: float,
        steps: int,
        start: int,
        length: int,
        block_length: int | None = None,
        temperature: float = 0.0,
        warp: Callable[[Tensor], Tensor] | None = None,
        remasking: str = "low_confidence",
        generator: torch.Generator | None = None,
    ):
        block_length = length if block_length is None else block_length
        check_blocks(steps, length, block_length)
        if temperature < 0:
            raise ValueError(f"temperature={temperature} must not be negative; 0 takes the most likely token.")
        if remasking not in REMASKING:
            raise ValueError(f"remasking={remasking!r} is not known; choose one of {list(REMASKING)}.")
        self.mask_token_id, self.mixing_ratio, self.steps = mask_token_id, mixing_ratio, steps
        self.start, self.length, self.block_length = start, length, block_length
        self.temperature, self.warp, self.remasking, self.generator = temperature, warp, remasking, generator
        self.steps_per_block = steps * block_length // length
        self.block_ends = {
            (block + 1) * self.steps_per_block - 1: start + (block + 1) * block_length
            for block in range(length // block_length)
        }

    def begin(self, ids: Tensor, generated: Tensor) -> Canvas:
        ids = torch.where(generated, self.mask_token_id, ids)
        return Canvas(ids, generated, generated, torch.zeros_like(ids[:, 0]))

    def request(self, canvas: Canvas, i: int) -> Request:
        """The current block, and with refinement everything before it in the answer: nothing else can change."""
        return Request(i, torch.arange(*self._columns(i), device=canvas.ids.device))

    def _columns(self, i: int) -> tuple[int, int]:
        block_start, block_end = self._block(i)
        return (self.start if self.mixing_ratio > 0 else block_start), block_end

    def step(self, canvas: Canvas, logits: Tensor, request: Request) -> Canvas:
        """1. Predict. 2. Fill the a_i most confident holes. 3. Refine the u_i most confident disagreements."""
        i = request.i
        first, last = self._columns(i)
        ids, holes, generated = (x[:, first:last] for x in (canvas.ids, canvas.holes, canvas.generated))
        predicted, conf_predicted, conf_current = self.predict(logits, ids)

        random = self.remasking == "random"
        priority = uniform(holes.shape, self.generator, holes.device) if random else conf_predicted
        fill = most_confident(priority, holes, self._fill_count(holes, i))
        if self.mixing_ratio > 0:
            disagrees = generated & ~holes & (predicted != ids) & (conf_predicted >= conf_current)
            refine = most_confident(conf_predicted, disagrees, self._edit_allowance(canvas, fill, i))
        else:
            refine = torch.zeros_like(fill)

        new_ids, new_holes = canvas.ids.clone(), canvas.holes.clone()
        new_ids[:, first:last] = torch.where(fill | refine, predicted, ids)
        new_holes[:, first:last] = holes & ~fill
        return replace(canvas, ids=new_ids, holes=new_holes, num_edits=canvas.num_edits + refine.sum(-1))

    def predict(self, logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Predicted ids, and the confidence of predicted and of current ids under the untempered float32 softmax."""
        logits = logits.to(torch.float64 if logits.dtype == torch.float64 else torch.float32, copy=True)
        logits[..., self.mask_token_id] = -torch.inf
        predicted = draw(logits, self.temperature, self.warp, self.generator)
        top = logits.amax(-1, keepdim=True)
        exponents = torch.cat([logits.gather(-1, x[..., None]) - top for x in (predicted, ids)], dim=-1)
        # exp(l - max) / sum, not exp(l - logsumexp): near certainty the latter cannot tell 1 - 1e-6 from 1.
        confidence = exponents.exp() / logits.sub_(top).exp_().sum(-1, keepdim=True)
        return predicted, confidence[..., 0], confidence[..., 1]

    def _block(self, i: int) -> tuple[int, int]:
        block_start = self.start + i // self.steps_per_block * self.block_length
        return block_start, block_start + self.block_length

    def _fill_count(self, holes: Tensor, i: int) -> Tensor:
        """a_i, (B,): what is left of the block over the steps that are left, so earlier steps take the remainder."""
        steps_left = self.steps_per_block - i % self.steps_per_block
        return (holes.sum(-1) + steps_left - 1) // steps_left

    def _edit_allowance(self, canvas: Canvas, fill: Tensor, i: int) -> Tensor:
        """u_i = floor(k / (1 - k) * tokens filled after this step) - edits so far, (B,); without limit at k = 1."""
        if i == 0:
            return torch.zeros_like(canvas.num_edits)
        filled = (canvas.generated & ~canvas.holes).sum(-1) + fill.sum(-1)
        if self.mixing_ratio == 1:
            return filled
        # The nudge keeps whole numbers whole: 0.1 / 0.9 * 9 may come out just below 1.
        # In float64: an integer tensor times a Python float would be float32, and the nudge lost in its rounding.
        budget = (filled.double() * (self.mixing_ratio / (1 - self.mixing_ratio)) + 1e-9).floor().long()
        return budget - canvas.num_edits


class ReferenceConfidenceSampler(ConfidenceSampler):
    """The released LLaDA-XDLM sampler token for token at temperature 0, to audit published numbers.

    It differs from `ConfidenceSampler` in what it lets happen: any unmasked position may be edited, prompt and padding
    included; any [MASK] is a hole, also one in the prompt; the mask row is not excluded; confidences have the logits'
    dtype; and the edit budget is floored per block, so that small blocks get none.
    """

    def _columns(self, i: int) -> tuple[int, int]:
        return 0, self._block(i)[1]

    def step(self, canvas: Canvas, logits: Tensor, request: Request) -> Canvas:
        everything = torch.ones_like(canvas.generated)
        canvas = replace(canvas, holes=canvas.ids == self.mask_token_id, generated=everything)
        return super().step(canvas, logits, request)

    def predict(self, logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        predicted = draw(logits, self.temperature, self.warp, self.generator)
        p = logits.softmax(-1)
        return predicted, *(p.gather(-1, x[..., None]).squeeze(-1) for x in (predicted, ids))

    def _fill_count(self, holes: Tensor, i: int) -> Tensor:
        done = i % self.steps_per_block
        return torch.full_like(holes[:, 0], self._quota(done + 1) - self._quota(done), dtype=torch.long)

    def _edit_allowance(self, canvas: Canvas, fill: Tensor, i: int) -> Tensor:
        finished_blocks, done = divmod(i, self.steps_per_block)
        if done == 0:
            return torch.zeros_like(canvas.num_edits)
        per_fill = self.mixing_ratio / (1 - self.mixing_ratio)
        budget = finished_blocks * int(per_fill * self.block_length) + int(per_fill * self._quota(done + 1))
        return budget - canvas.num_edits

    def _quota(self, done: int) -> int:
        """Tokens of a block that are to be filled after `done` of its steps."""
        whole, rest = divmod(self.block_length, self.steps_per_block)
        return done * whole + min(done, rest)


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
        self.block_ends = {steps - 1: start + length}

    def begin(self, ids: Tensor, generated: Tensor) -> Canvas:
        prior = self.kernel.sample_prior(tuple(ids.shape), self.generator, ids.device)
        nothing = torch.zeros_like(generated)
        return Canvas(torch.where(generated, prior, ids), nothing, generated, torch.zeros_like(ids[:, 0]))

    def request(self, canvas: Canvas, i: int) -> Request:
        """Draws all of the step that does not depend on p, and asks for the positions where p decides.

        Late in a long chain these are few: a token that stays whatever p is needs no logits, nor does a [MASK] that
        stays one.
        """
        times = torch.tensor([1 - i / self.steps, 1 - (i + 1) / self.steps], dtype=torch.float64)
        (alpha_t, alpha_s), _ = self.schedule(times.to(canvas.ids.device))
        draw = begin_step(canvas.ids, alpha_s.view(1, 1), alpha_t.view(1, 1), self.kernel, self.generator)
        draw = replace(
            draw, most=torch.where(canvas.generated, draw.most, 0.0), needs_p=draw.needs_p & canvas.generated
        )
        return Request(i, draw.needs_p, draw)

    def step(self, canvas: Canvas, logits: Tensor, request: Request) -> Canvas:
        """One exact draw from q(z_s | z_t, p), s = t - 1 / steps, at the generated positions."""
        z_s = finish_step(request.draw, self._tempered(logits), self.kernel, self.generator)
        special = torch.zeros_like(canvas.generated)
        for token_id in self.kernel.absorbing_ids:
            special |= (canvas.ids == token_id) | (z_s == token_id)
        edits = ((z_s != canvas.ids) & ~special).sum(-1)
        return replace(canvas, ids=z_s, num_edits=canvas.num_edits + edits)

    def _tempered(self, logits: Tensor) -> Tensor:
        if self.temperature == 1 and self.warp is None:
            return logits
        logits = masked_logits(logits, self.kernel) / self.temperature
        return logits if self.warp is None else self.warp(logits)


def draw(
    logits: Tensor, temperature: float, warp: Callable[[Tensor], Tensor] | None, generator: torch.Generator | None
) -> Tensor:
    """argmax at temperature 0, else a draw from softmax(warp(logits / temperature)); (B, C, N) to (B, C) ids."""
    if temperature == 0:
        return logits.argmax(-1)
    tempered = logits.flatten(0, -2) / temperature
    tempered = tempered if warp is None else warp(tempered)
    return sample_categorical(tempered, generator=generator).view(logits.shape[:-1])


def most_confident(priority: Tensor, candidates: Tensor, count: Tensor) -> Tensor:
    """Mask of the `count` candidates of highest priority in each row; equal priorities: the lower position first.

    Args:
        priority: (B, C), finite.
        candidates: (B, C) bool.
        count: (B,) int64; a count below 0 takes none, one above the number of candidates takes all.

    Returns:
        (B, C) bool.
    """
    order = torch.where(candidates, priority, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(
        -1, order, torch.arange(order.shape[-1], device=order.device).expand_as(order)
    )
    return candidates & (rank < count[:, None])


def check_positive(**values: int) -> None:
    """Raise ValueError naming the first value that is not a positive integer."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
            raise ValueError(f"{name}={value!r} must be a positive integer.")


def check_blocks(steps: int, length: int, block_length: int) -> None:
    """Raise ValueError unless `block_length` divides the answer and the steps spread evenly over its blocks."""
    check_positive(steps=steps, max_new_tokens=length, block_length=block_length)
    if length % block_length:
        divisors = [d for d in range(1, length + 1) if length % d == 0]
        nearest = min(divisors, key=lambda d: abs(d - block_length))
        raise ValueError(
            f"block_length={block_length} does not divide max_new_tokens={length}; use e.g. block_length={nearest}."
        )
    if steps > length:
        raise ValueError(
            f"steps={steps} is more than max_new_tokens={length}: every step fills at least one; use steps={length}."
        )
    blocks = length // block_length
    if steps % blocks:
        raise ValueError(
            f"steps={steps} does not spread evenly over the {blocks} blocks of {block_length} tokens; "
            f"use a multiple of {blocks}, e.g. steps={math.ceil(steps / blocks) * blocks}."
        )
