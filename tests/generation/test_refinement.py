"""Refinement policies on logits written down by hand, one policy at a time."""

import pytest
import torch

from xdlm_hf.generation.confidence import ConfidenceSampler, ConfidenceSettings
from xdlm_hf.generation.refinement import (
    BudgetRefinement,
    EditLimit,
    NoRefinement,
    OffInLastSteps,
    RemaskingRefinement,
    ThresholdRefinement,
)

MASK, N = 0, 6


def run(sampler, script, rows=1):
    """Canvases after each step; `script` gives the step's tokens and confidences over the answer, or None for noise."""
    ids = torch.zeros(rows, sampler.length, dtype=torch.long)
    canvas = sampler.begin(ids, torch.ones_like(ids, dtype=torch.bool))
    canvases, i, generator = [canvas], sampler.first_step(canvas), torch.Generator().manual_seed(0)
    while i < sampler.steps:
        if script is None:
            logits = torch.randn(rows, sampler.length, N, generator=generator) * 3
        else:
            logits = logits_for(*script[i]).expand(rows, -1, -1)
        request = sampler.request(canvas, i)
        before, canvas = canvas, sampler.step(canvas, logits[:, request.columns], request)
        canvases.append(canvas)
        i = sampler.next_step(before, canvas, i)
    return canvases


def logits_for(tokens, confidences):
    """Logits (1, C, N) whose softmax without the mask row gives `tokens` the `confidences`, the rest spread evenly."""
    p = torch.tensor(confidences, dtype=torch.float32)[:, None]
    chosen = torch.nn.functional.one_hot(torch.tensor(tokens), N)
    probs = chosen * p + (1 - chosen) * (1 - p) / (N - 2)
    probs[:, MASK] = 0
    return probs.log()[None]


def sampler(policy, steps, length, generator=None, **options):
    settings = ConfidenceSettings(MASK, 0.0, steps, refinement=policy, **options)
    return ConfidenceSampler(settings, 0, length, generator)


def test_threshold_edits_every_sure_disagreement():
    script = [
        ([1, 1, 1, 1], [0.9, 0.8, 0.7, 0.6]),  # fills the first two
        ([2, 2, 3, 3], [0.9, 0.6, 0.8, 0.8]),  # the second edit is below the threshold
    ]
    last = run(sampler(ThresholdRefinement(0.7), 2, 4), script)[-1]
    assert last.ids.tolist() == [[2, 1, 3, 3]] and last.num_edits.tolist() == [1]


def test_without_refinement_a_token_stays():
    script = [([1, 1], [0.9, 0.5]), ([2, 2], [0.99, 0.99])]
    last = run(sampler(NoRefinement(), 2, 2), script)[-1]
    assert last.ids.tolist() == [[1, 2]] and last.num_edits.tolist() == [0]


def test_loop_guard_stops_a_pair_of_tokens_that_swap():
    swap = [([1], [0.9]), ([2], [0.9]), ([1], [0.9]), ([2], [0.9]), ([1], [0.9])]
    free = run(sampler(ThresholdRefinement(0.5), 1, 1, polish_steps=4), swap)
    assert [c.ids.item() for c in free] == [0, 1, 2, 1, 2, 1]
    guarded = run(sampler(EditLimit(ThresholdRefinement(0.5), 10), 1, 1, polish_steps=4), swap)
    assert [c.ids.item() for c in guarded] == [0, 1, 2, 2]  # never back to 1, and nothing changes: the polish ends


def test_loop_guard_counts_the_edits_of_a_position():
    tour = [([1], [0.9]), ([2], [0.9]), ([3], [0.9]), ([4], [0.9])]
    guarded = run(sampler(EditLimit(ThresholdRefinement(0.5), 2), 1, 1, polish_steps=3), tour)
    assert [c.ids.item() for c in guarded] == [0, 1, 2, 3, 3]


def test_loop_guard_leaves_the_budget_to_others():
    script = [([1, 1], [0.9, 0.8]), ([2, 1], [0.9, 0.9]), ([1, 3], [0.95, 0.9])]
    policy = EditLimit(BudgetRefinement(0.5), 5)
    last = run(sampler(policy, 1, 2, polish_steps=2), script)[-1]
    assert last.ids.tolist() == [[2, 3]]  # back to 1 is closed, so the second edit goes to the other position


def test_switched_off_for_the_last_steps():
    policy = OffInLastSteps(ThresholdRefinement(0.5), 2)
    canvases = run(sampler(policy, 8, 8), None)
    edits = torch.cat([c.num_edits for c in canvases])
    assert edits[6] > 0 and (edits[6:] == edits[6]).all()


def test_polishing_spreads_the_budget_over_its_steps():
    sure = [0.9] * 6
    script = [([1] * 6, sure), ([2] * 6, sure), ([3] * 6, sure), ([4] * 6, sure)]
    canvases = run(sampler(BudgetRefinement(0.5), 1, 6, polish_steps=3), script)
    assert [c.num_edits.item() for c in canvases] == [0, 0, 2, 4, 6]


def test_threshold_fills_whatever_is_sure_and_at_least_one():
    script = {0: ([1] * 4, [0.5, 0.95, 0.4, 0.9]), 1: ([2] * 4, [0.5, 0.9, 0.6, 0.9]), 2: ([3] * 4, [0.5] * 4)}
    canvases = run(sampler(NoRefinement(), 4, 4, confidence_threshold=0.9), script)
    assert [c.ids.tolist() for c in canvases[1:]] == [[[0, 1, 0, 1]], [[0, 1, 2, 1]], [[3, 1, 2, 1]]]


def test_factor_fills_the_largest_sure_set():
    # (n + 1) (1 - c_n): 0.2, 0.6, 1.2, ... for c = 0.9, 0.8, 0.7, 0.3: below 1 for n = 1, 2
    script = {0: ([1] * 4, [0.8, 0.3, 0.9, 0.7]), 1: ([2] * 4, [0.5] * 4), 2: ([3] * 4, [0.5] * 4)}
    canvases = run(sampler(NoRefinement(), 4, 4, confidence_factor=1.0), script)
    assert canvases[1].ids.tolist() == [[1, 0, 1, 0]]


def test_a_full_row_waits_unchanged_for_the_others():
    """Row 0 is sure of everything, row 1 of nothing: row 0 must be what it is alone."""
    policy = ThresholdRefinement(0.5)
    both = sampler(policy, 4, 4, confidence_threshold=0.9)
    ids = torch.zeros(2, 4, dtype=torch.long)
    canvas = both.begin(ids, torch.ones_like(ids, dtype=torch.bool))
    sure, unsure = logits_for([1] * 4, [0.95] * 4), logits_for([1] * 4, [0.4] * 4)
    canvas = both.step(canvas, torch.cat([sure, unsure]), both.request(canvas, 0))
    assert both.active_rows(canvas, 1).tolist() == [False, True]
    other = logits_for([2] * 4, [0.95] * 4)
    canvas = both.step(canvas, torch.cat([other, unsure]), both.request(canvas, 1))
    assert canvas.ids[0].tolist() == [1] * 4 and canvas.num_edits.tolist() == [0, 0]


@pytest.mark.parametrize("schedule, rate", [("cap", 0.3), ("rescale", 0.5), ("confidence", 1.0)])
def test_remasking_keeps_the_schedule_and_leaves_no_hole(schedule, rate):
    engine = sampler(RemaskingRefinement(schedule, rate), 8, 32, generator=torch.Generator().manual_seed(0))
    canvases = run(engine, None, rows=4)
    holes = torch.stack([c.holes.sum(-1) for c in canvases])
    planned = torch.arange(32, -1, -4)[:, None]
    # More tokens may be taken back than there are holes left to fill instead; the last step fills them all.
    assert (holes >= planned).all() and (holes[:5] == planned[:5]).all() and (holes[-1] == 0).all()
    assert canvases[-1].num_remasked.sum() > 0 and (canvases[-1].ids != MASK).all()
    assert all(((c.ids == MASK) == c.holes).all() for c in canvases)


@pytest.mark.parametrize("schedule, sigma", [("cap", 0.2), ("rescale", 0.2 / 3)])
def test_remasking_frequency(schedule, sigma):
    """Step 4 of 5 in one block: alpha_t = 3/5, sigma_max = (1 - 4/5) / (3/5) = 1/3; a false alarm once in 1e5 runs."""
    rows, length = 400, 50
    engine = sampler(RemaskingRefinement(schedule, 0.2), 5, length, generator=torch.Generator().manual_seed(1))
    canvases = run(engine, None, rows=rows)
    filled = rows * 30
    remasked = (canvases[4].num_remasked - canvases[3].num_remasked).sum().item()
    assert abs(remasked - filled * sigma) < 4.4 * (filled * sigma * (1 - sigma)) ** 0.5


def test_remasking_by_confidence_prefers_the_unsure():
    engine = sampler(RemaskingRefinement("confidence", 0.6), 2, 4)
    canvas = engine.begin(torch.zeros(1, 4, dtype=torch.long), torch.ones(1, 4, dtype=torch.bool))
    canvas = engine.step(canvas, logits_for([1] * 4, [0.9, 0.5, 0.3, 0.2]), engine.request(canvas, 0))
    look = engine._view(canvas, logits_for([1] * 4, [0.5] * 4), engine.request(canvas, 1))
    look = type(look)(**{**vars(look), "done": 1, "steps_per_block": 4})  # sigma_max = min(1, (1 - 2/4) / (1/4)) = 1
    sigma = engine.refinement.sigma(look, look.editable)[0]
    share = torch.tensor([-0.9, -0.5]).double().softmax(-1)
    assert torch.allclose(sigma[:2], 0.6 * share) and (sigma[2:] == 0).all()


def test_remasking_stays_inside_the_block():
    engine = sampler(RemaskingRefinement("cap", 1.0), 8, 16, block_length=8, generator=torch.Generator().manual_seed(0))
    canvases = run(engine, None)
    assert canvases[4].ids[0, :8].min() > 0
    assert all(c.ids[0, :8].equal(canvases[4].ids[0, :8]) for c in canvases[5:])


@pytest.mark.parametrize(
    "policy, most",
    [
        (NoRefinement(), 0),
        (BudgetRefinement(0.1), 2),
        (BudgetRefinement(0.4), 12),
        (BudgetRefinement(1.0), 18),
        (ThresholdRefinement(0.2), 18),
        (RemaskingRefinement("cap", 0.5), 0),
        (OffInLastSteps(EditLimit(BudgetRefinement(0.4), 2), 1), 12),
    ],
)
def test_no_step_edits_more_than_its_bound(policy, most):
    polish_steps = 3 if policy.edits else 0
    canvases = run(sampler(policy, 3, 18, torch.Generator().manual_seed(1), polish_steps=polish_steps), None, rows=4)
    edits = torch.stack([canvas.num_edits for canvas in canvases]).diff(dim=0)
    assert policy.most_edits(18) == most and edits.max() <= most
