"""The authors' released samplers, reproduced token for token with `reference_compat=True`, to audit published numbers.

All differences from the default samplers are in this module:

    confidence sampler   any [MASK] is a hole and any other token may be edited, also in prompt and padding; the mask
                         row is not excluded; confidences are a softmax in the dtype of the logits; `torch.topk` over
                         the whole row decides ties; each block has its own edit budget, whose unused part is dropped
    guidance             in the unconditional text every token that was not [MASK] at the start is masked, padding
                         included; both texts are one batch, and their logits are combined in their own dtype
    padding              is masked in attention, but counted in positions; nothing becomes padding after end-of-text
    ancestral sampler    T + 1 passes on the release's time grid and log-linear schedule; the dense posterior is sampled
                         with Gumbel noise

At temperature 0 the confidence sampler gives the released tokens if the network gives the released logits, on the same
kind of device: `torch.topk` breaks ties differently on a GPU and a CPU.

Shapes: B batch, T total length (prompt and answer), N rows of the output layer.
"""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..diffusion.categorical import masked_logits, refuse_undefined, uniform
from ..diffusion.process import NoiseProcess, StationaryProcess
from ..diffusion.schedules import LogLinearSchedule
from .ancestral import AncestralSampler
from .blocks import check_even_blocks
from .canvas import Canvas
from .confidence import REMASKING
from .network import Network
from .sampler import Request, Sampler

_LAST_TIME = 1e-5


def make_released_sampler(options: Any, process: NoiseProcess | None, **common: Any) -> Sampler:
    """The released sampler for these options; only the ancestral one uses `process`, `common` are of both."""
    if options.sampler == "ancestral":
        if isinstance(process, StationaryProcess):  # GIDD keeps its own schedule
            process = StationaryProcess(process.kernel, LogLinearSchedule())
        return ReferenceAncestralSampler(process, **common)
    return ReferenceConfidenceSampler(
        options.mask_token_id,
        options.mixing_ratio,
        block_length=options.block_length,
        temperature=options.temperature or 0.0,
        remasking=options.remasking or "low_confidence",
        **common,
    )


class ReferenceNetwork(Network):
    """Logits as the released code computes them: its guidance, and its position ids of padded rows."""

    counts_padding = True
    one_batch = True  # in low precision the batch size can change the rounding of a product

    def _guidance_mask(self, attention_mask: Tensor, canvas: Canvas) -> Tensor:
        return canvas.ids != self.options.mask_token_id

    def _upcast(self, logits: Tensor) -> Tensor:
        return logits


class ReferenceConfidenceSampler(Sampler):
    """The released LLaDA-XDLM sampler.

    A step fills the most confident holes up to the end of the block and replaces the most confident disagreements, by
    the same logits. The first i steps of a block make at most floor(k / (1 - k) n_i) edits, where n_i is the number of
    tokens that they fill; its first step makes none.

    Args:
        mask_token_id: m.
        mixing_ratio: k in [0, 1).
        steps: Forward passes; a multiple of the number of blocks.
        start, length: The answer is the columns [start, start + length).
        block_length: Columns of a block; divides `length`.
        temperature: 0 predicts the argmax; above it, Gumbel-max in float64.
        remasking: "low_confidence", or "random" to choose the holes to fill at random, with k = 0 alone.
        generator: Source of randomness.

    Raises:
        ValueError: If the lengths or steps do not fit each other, or an option is not known.
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
        remasking: str = "low_confidence",
        generator: torch.Generator | None = None,
    ):
        block_length = length if block_length is None else block_length
        check_even_blocks(steps, length, block_length)
        if not 0 <= mixing_ratio < 1:
            raise ValueError(f"mixing_ratio={mixing_ratio} must lie in [0, 1): the budget is k / (1 - k).")
        if temperature < 0:
            raise ValueError(f"temperature={temperature} must not be negative; 0 takes the most likely token.")
        if remasking not in REMASKING or (remasking == "random" and mixing_ratio):
            raise ValueError(f"remasking={remasking!r} is not released; use 'low_confidence', or 'random' with k = 0.")
        self.mask_token_id, self.mixing_ratio, self.steps = mask_token_id, mixing_ratio, steps
        self.start, self.length, self.block_length = start, length, block_length
        self.temperature, self.remasking, self.generator = temperature, remasking, generator
        self.steps_per_block = steps * block_length // length

    def begin(self, ids: Tensor, generated: Tensor, holes: Tensor | None = None) -> Canvas:
        ids = torch.where(generated if holes is None else holes, self.mask_token_id, ids)
        zeros = torch.zeros_like(ids[:, 0])
        return Canvas(ids, ids == self.mask_token_id, generated, zeros, zeros, zeros.bool(), {"spent": zeros})

    def block(self, i: int) -> tuple[int, int]:
        first = self.start + i // self.steps_per_block * self.block_length
        return first, first + self.block_length

    def request(self, canvas: Canvas, i: int) -> Request:
        """All columns, because `torch.topk` breaks ties by the width of the row."""
        return Request(i, columns=torch.arange(canvas.ids.shape[1], device=canvas.ids.device))

    def step(self, canvas: Canvas, logits: Tensor, request: Request) -> Canvas:
        """1. Predict. 2. Choose holes to fill. 3. Choose tokens to edit. 4. Write both."""
        ids, holes = canvas.ids, canvas.ids == self.mask_token_id
        done, end = request.i % self.steps_per_block, self.block(request.i)[1]
        # 1.
        predicted, conf_predicted, conf_current = self.predict(logits, ids)
        undefined = conf_predicted.isnan()
        if self.remasking == "random":
            conf_predicted = uniform(ids.shape, self.generator, ids.device, torch.float32)
        conf_predicted[:, end:] = -torch.inf
        # 2.
        filled = [self._filled(n) for n in (done, done + 1)]
        chosen = topk_mask(conf_predicted, holes, [filled[1] - filled[0]] * len(ids))
        # 3.
        spent = canvas.memory["spent"] if done else torch.zeros_like(canvas.num_edits)
        if self.mixing_ratio and done:
            wanted = ~holes & (predicted != ids) & (conf_predicted >= conf_current)
            left = edit_budget(filled[1], self.mixing_ratio, ids.device) - spent
            edits = torch.minimum(left, wanted.sum(-1))
            chosen |= topk_mask(conf_predicted, wanted, edits.tolist())
            canvas, spent = replace(canvas, num_edits=canvas.num_edits + edits), spent + edits
        # 4.
        ids = torch.where(chosen, predicted, ids)
        return replace(
            canvas,
            ids=ids,
            holes=ids == self.mask_token_id,
            undefined=canvas.undefined | (undefined & chosen).any(-1),
            memory={"spent": spent},
        )

    def predict(self, logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Predicted ids, and the confidence of predicted and of current ids, (B, T) each, from logits (B, T, N)."""
        p = logits.softmax(-1)
        predicted = gumbel_argmax(logits, self.temperature, self.generator)
        return predicted, *(p.gather(-1, x[..., None]).squeeze(-1) for x in (predicted, ids))

    def _filled(self, done: int) -> int:
        """Number of tokens that the first `done` steps of a block fill; earlier steps take the remainder."""
        whole, rest = divmod(self.block_length, self.steps_per_block)
        return done * whole + min(done, rest)


def edit_budget(filled: int, k: float, device: torch.device) -> Tensor:
    """floor(filled k / (1 - k)), (1,) int64, in float32 as in the release (an integer tensor times a float).

    Computed on the device, because a GPU rounds division by a scalar differently.
    """
    return (torch.tensor([filled], device=device) * k / (1 - k)).floor().long()


def topk_mask(confidence: Tensor, candidates: Tensor, counts: list[int]) -> Tensor:
    """(B, T) bool: the `counts` most confident candidates of each row; `torch.topk` over the row breaks ties."""
    ranked, chosen = torch.where(candidates, confidence, -torch.inf), torch.zeros_like(candidates)
    for row, count in enumerate(counts):
        chosen[row, ranked[row].topk(count).indices] = True
    return chosen


def gumbel_argmax(logits: Tensor, temperature: float, generator: torch.Generator | None = None) -> Tensor:
    """Tokens drawn from softmax(l / temperature), argmax of exp(l) / (-log u)^temperature in float64, or argmax l."""
    if temperature == 0:
        return logits.argmax(-1)
    u = uniform(logits.shape, generator, logits.device)
    return (logits.double().exp() / (-u.log()) ** temperature).argmax(-1)


class ReferenceAncestralSampler(AncestralSampler):
    """The released ancestral chain: `steps` steps and one more pass, the dense posterior sampled with Gumbel noise.

    Times are `linspace(1, 1e-5, steps + 1)`; the additional pass goes from the last one to alpha = 1. For k < 1 the
    noise is float32, whose resolution of 6e-8 makes tokens of small probability too rare, above all those of the
    uniform noise; for k = 1, UDLM, posterior and noise are float64. A token with odds r against a token of weight 1
    keeps the share y / (e^y - 1) of its probability, y = 2^-24 / r.

    The release trains and samples GIDD with p_u = 0 and ends it at s = 1e-8; here its last pass also ends at s = 0.

    Args:
        process: The noise, over the model's N rows; the release's schedule is `LogLinearSchedule()`.
        steps: Steps, not counting the additional pass.
        start, length, generator: As in `AncestralSampler`.
    """

    def __init__(
        self,
        process: NoiseProcess,
        steps: int,
        start: int,
        length: int,
        generator: torch.Generator | None = None,
    ):
        super().__init__(process, steps, start, length, generator=generator)
        self.grid, self.steps = torch.linspace(1, _LAST_TIME, steps + 1), steps + 1

    def _prior(self, shape: tuple[int, ...], device: torch.device) -> Tensor:
        """[MASK] where a float32 uniform number is below 1 - k, else a uniform token.

        As in the release, nothing is drawn at k = 0, and only tokens at k = 1.
        """
        k, source = float(self.process.prior.mixing_ratio), device if self.generator is None else self.generator.device
        if k == 0:
            return torch.full(shape, self.process.mask_token_id, device=device)
        masked = k < 1 and uniform(shape, self.generator, device, torch.float32) < 1 - k
        ids = torch.randint(self.process.vocab_size, shape, generator=self.generator, device=source).to(device)
        return ids if k == 1 else ids.masked_fill(masked, self.process.mask_token_id)

    def request(self, canvas: Canvas, i: int) -> Request:
        """All positions of the answer, as in the release."""
        return Request(i, mask=canvas.generated, t=self.times(i)[1].item())

    def step(self, canvas: Canvas, logits: Iterable[Tensor], request: Request) -> Canvas:
        s, t = (time[0].to(canvas.ids.device) for time in self.times(request.i))
        noise = self.process.noise(s[:, None])
        p = masked_logits(torch.cat(list(logits)), noise.absorbing_ids).softmax(-1)[None]
        refuse_undefined(p[..., 0].isnan())  # one NaN makes a whole softmax NaN
        p = p.double() if noise.mixing_ratio == 1 else p.float()
        probs = self.process.posterior(p, canvas.ids[canvas.generated][None], s, t)
        u = uniform(probs.shape, self.generator, probs.device, probs.dtype)
        # Gumbel-max without its logarithm: argmax of p / E, E exponential.
        drawn = (probs / (1e-10 - (u + 1e-10).log())).argmax(-1)
        z_s = canvas.ids.masked_scatter(canvas.generated, drawn[0])
        return self._with_ids(canvas, z_s, noise.absorbing_ids)

    def times(self, i: int) -> tuple[Tensor, Tensor]:
        """s and t of step `i`, (1, 1) each, float32, on the CPU; the additional pass ends at s = 0, alpha_s = 1."""
        t = self.grid[i].view(1, 1)
        return (torch.zeros_like(t) if i == self.steps - 1 else t - (1 - _LAST_TIME) / (self.steps - 1)), t
