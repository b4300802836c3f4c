"""Policies that revise committed tokens, by editing or re-masking them; one class each.

A policy gets a `StepView`, the predictions of one step. `edit` selects filled tokens to replace by the predicted ones,
`remask` filled tokens to turn into holes again. Policies are stateless; state per position is in `Canvas.memory`. Any
policy works with any weights; only XDLM's budget depends on k.

Shapes: B batch, T total length, C columns of a step. Confidences are probabilities under the untempered softmax.
"""

from abc import ABC, abstractmethod
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..diffusion.categorical import uniform
from .canvas import StepView

REMASK_SCHEDULES = ("cap", "rescale", "confidence")


class Refinement(ABC):
    """Interface of refinement policies. `edit` and `remask` return (B, C) bool."""

    edits = True  # False: never edits, so filled positions need no logits
    remasks = False  # True: filled tokens of the current block may become holes again

    @abstractmethod
    def edit(self, view: StepView, fill: Tensor) -> Tensor:
        """Filled tokens to replace by the predicted ones; `fill` (B, C) are the holes that this step fills."""

    def most_edits(self, length: int) -> int:
        """Upper bound of the edits of one step in a row that may change at `length` positions."""
        return length if self.edits else 0

    def remask(self, view: StepView) -> Tensor:
        """Filled tokens to turn into holes again; the step fills as many holes in addition, if there are enough."""
        return torch.zeros_like(view.holes)

    def remember(self, view: StepView, filled: Tensor, edited: Tensor) -> dict[str, Tensor]:
        """`Canvas.memory` after the step."""
        return view.canvas.memory


class NoRefinement(Refinement):
    """Filled tokens never change: LLaDA's sampler, XDLM at k = 0."""

    edits = False

    def edit(self, view: StepView, fill: Tensor) -> Tensor:
        return torch.zeros_like(fill)


class BudgetRefinement(Refinement):
    """XDLM's refinement, Algorithm 1 of the paper: the most confident disagreements, within a budget.

    The number of edits up to a step is at most floor(k / (1 - k) * tokens filled so far), and 0 at the first step; an
    unused budget carries over. Steps that only refine spread the remaining budget evenly. At k = 1 it is unlimited.

    Args:
        mixing_ratio: k in [0, 1].
    """

    def __init__(self, mixing_ratio: float):
        self.mixing_ratio = mixing_ratio

    def edit(self, view: StepView, fill: Tensor) -> Tensor:
        return most_confident(view.conf_predicted, view.disagrees, self.allowance(view, fill))

    def most_edits(self, length: int) -> int:
        return length if self.mixing_ratio == 1 else int(length * (self.mixing_ratio / (1 - self.mixing_ratio)) + 1e-9)

    def allowance(self, view: StepView, fill: Tensor) -> Tensor:
        """u_i, (B,): maximum number of edits in this step."""
        canvas = view.canvas
        if view.step == 0 and not view.polish_steps_left:
            return torch.zeros_like(canvas.num_edits)
        filled = (canvas.generated & ~canvas.holes).sum(-1) + fill.sum(-1)
        if self.mixing_ratio == 1:
            return filled
        # 1e-9 corrects rounding: 0.1 / 0.9 * 9 may come out just below 1. In float64, because an integer tensor times a
        # Python float is float32, which would round 1e-9 away.
        budget = (filled.double() * (self.mixing_ratio / (1 - self.mixing_ratio)) + 1e-9).floor().long()
        left = budget - canvas.num_edits
        return -(-left // view.polish_steps_left) if view.polish_steps_left else left


class ThresholdRefinement(Refinement):
    """Threshold editing, as in LLaDA2.1: every disagreement whose prediction has at least the threshold's confidence.

    Args:
        threshold: In (0, 1].
    """

    def __init__(self, threshold: float):
        self.threshold = threshold

    def edit(self, view: StepView, fill: Tensor) -> Tensor:
        return view.disagrees & (view.conf_predicted >= self.threshold)


class RemaskingRefinement(Refinement):
    """ReMDM's re-masking (Wang et al., arXiv 2503.00307): a block's filled tokens become holes with probability sigma.

    Step j of a block of n steps goes from alpha_t = j / n to alpha_s = (j + 1) / n. The largest sigma that preserves
    the marginals is sigma_max = min(1, (1 - alpha_s) / alpha_t). It is 0 in the last step, so that no hole is left.

        cap           sigma = min(rate, sigma_max)
        rescale       sigma = rate * sigma_max
        confidence    sigma = rate * sigma_max * softmax(-psi), psi the confidence with which a token was filled: at
                      most `rate` tokens on average, preferably those of low confidence

    Args:
        schedule: One of `REMASK_SCHEDULES`.
        rate: In (0, 1].
    """

    edits, remasks = False, True

    def __init__(self, schedule: str, rate: float):
        self.schedule, self.rate = schedule, rate

    def edit(self, view: StepView, fill: Tensor) -> Tensor:
        return torch.zeros_like(fill)

    def remask(self, view: StepView) -> Tensor:
        candidates = view.editable & view.in_block
        u = uniform(candidates.shape, view.generator, candidates.device)
        return candidates & (u < self.sigma(view, candidates))

    def sigma(self, view: StepView, candidates: Tensor) -> Tensor | float:
        """Probability that a candidate becomes a hole, float or (B, C)."""
        alpha_t, alpha_s = view.done / view.steps_per_block, (view.done + 1) / view.steps_per_block
        largest = min(1.0, (1 - alpha_s) / alpha_t) if alpha_t > 0 else 1.0
        if self.schedule == "cap":
            return min(self.rate, largest)
        if self.schedule == "rescale":
            return self.rate * largest
        psi = view.recall("confidence", 0.0).double()
        share = torch.where(candidates, -psi, -torch.inf).softmax(-1)
        return self.rate * largest * share.nan_to_num(0.0)  # a row without candidates has no softmax

    def remember(self, view: StepView, filled: Tensor, edited: Tensor) -> dict[str, Tensor]:
        if self.schedule != "confidence":
            return view.canvas.memory
        confidence = torch.where(filled, view.conf_predicted, view.recall("confidence", 0.0))
        return {**view.canvas.memory, "confidence": remembered(view, "confidence", confidence)}


class OffInLastSteps(Refinement):
    """Wraps a policy and switches it off in the last filling steps (as with k = 0).

    Args:
        policy: The policy.
        last_steps: Number of these steps.
    """

    def __init__(self, policy: Refinement, last_steps: int):
        self.policy, self.last_steps = policy, last_steps
        self.edits, self.remasks = policy.edits, policy.remasks

    def _off(self, view: StepView) -> bool:
        return 0 < view.fill_steps_left <= self.last_steps

    def edit(self, view: StepView, fill: Tensor) -> Tensor:
        return torch.zeros_like(fill) if self._off(view) else self.policy.edit(view, fill)

    def most_edits(self, length: int) -> int:
        return self.policy.most_edits(length)

    def remask(self, view: StepView) -> Tensor:
        return torch.zeros_like(view.holes) if self._off(view) else self.policy.remask(view)

    def remember(self, view: StepView, filled: Tensor, edited: Tensor) -> dict[str, Tensor]:
        return self.policy.remember(view, filled, edited)


class EditLimit(Refinement):
    """Wraps a policy and limits the edits of each position.

    A position is edited at most `max_edits` times, and never back to the token that its last edit replaced. Otherwise a
    position could alternate between two tokens without end.

    Args:
        policy: The policy.
        max_edits: Maximum number of edits of a position, at least 1.
    """

    def __init__(self, policy: Refinement, max_edits: int):
        self.policy, self.max_edits = policy, max_edits
        self.edits, self.remasks = policy.edits, policy.remasks

    def edit(self, view: StepView, fill: Tensor) -> Tensor:
        allowed = view.recall("edits", 0) < self.max_edits
        allowed &= view.predicted != view.recall("replaced", -1).long()
        return self.policy.edit(replace(view, editable=view.editable & allowed), fill)

    def most_edits(self, length: int) -> int:
        return self.policy.most_edits(length)

    def remask(self, view: StepView) -> Tensor:
        return self.policy.remask(view)

    def remember(self, view: StepView, filled: Tensor, edited: Tensor) -> dict[str, Tensor]:
        memory = dict(self.policy.remember(view, filled, edited))
        # float64 represents every id exactly, and all memories have one dtype.
        edits = view.recall("edits", 0).double() + edited
        replaced = torch.where(edited, view.ids.double(), view.recall("replaced", -1).double())
        memory["edits"] = remembered(view, "edits", edits)
        memory["replaced"] = remembered(view, "replaced", replaced, empty=-1)
        return memory


def remembered(view: StepView, name: str, values: Tensor, empty: float = 0) -> Tensor:
    """The memory `name`, (B, T) float64, with `values` (B, C) at the columns of the view."""
    kept = view.canvas.memory.get(name)
    kept = torch.full(view.canvas.ids.shape, empty, dtype=torch.double, device=values.device) if kept is None else kept
    return view.write(kept, values.double())


def make_refinement(options: Any) -> Refinement:
    """The policy of resolved options."""
    name = options.policy
    if name == "none":
        return NoRefinement()
    if name == "budget":
        policy: Refinement = BudgetRefinement(options.mixing_ratio)
    elif name == "threshold":
        policy = ThresholdRefinement(options.edit_threshold)
    else:
        policy = RemaskingRefinement(name.removeprefix("remdm_"), options.remask_rate)
    if options.max_edits_per_token is not None:
        policy = EditLimit(policy, options.max_edits_per_token)
    if options.refinement_off_steps is not None:
        policy = OffInLastSteps(policy, options.refinement_off_steps)
    return policy


def most_confident(priority: Tensor, candidates: Tensor, count: Tensor) -> Tensor:
    """Mask of the `count` candidates of highest priority in each row; ties go to the lower position.

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
