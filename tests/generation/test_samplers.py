"""Samplers on logits written down by hand: what is filled, what is refined, and how often what is drawn."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import one_hot

from xdlm_hf.diffusion.noise import NoiseKernel
from xdlm_hf.diffusion.process import StationaryProcess
from xdlm_hf.diffusion.schedules import CosineSchedule, LinearSchedule
from xdlm_hf.generation.ancestral import AncestralSampler
from xdlm_hf.generation.canvas import Canvas
from xdlm_hf.generation.confidence import ConfidenceSampler, ConfidenceSettings
from xdlm_hf.generation.refinement import BudgetRefinement, most_confident

MASK, N = 0, 6


def confidence_sampler(mixing_ratio, steps, start, length, generator=None, **settings):
    return ConfidenceSampler(ConfidenceSettings(MASK, mixing_ratio, steps, **settings), start, length, generator)


def begin(sampler, prompt):
    ids = torch.nn.functional.pad(prompt, (0, sampler.length))
    generated = torch.zeros_like(ids, dtype=torch.bool)
    generated[:, prompt.shape[1] :] = True
    return sampler.begin(ids, generated)


def advance(sampler, canvas, i, logits=None):
    """One step on the given logits, (B, L, N) over the answer, or on random ones."""
    request = sampler.request(canvas, i)
    if logits is None:
        logits = torch.randn(len(canvas.ids), sampler.length, N) * 3
    whole = torch.nn.functional.pad(logits, (0, 0, sampler.start, 0))
    if request.mask is None:
        return sampler.step(canvas, whole[:, request.columns], request)
    asked = whole[request.mask]
    return sampler.step(canvas, asked.split(2 + len(asked) // 3), request)  # in chunks, as the network hands them over


def logits_for(tokens, confidences):
    """Logits (1, C, N) whose softmax without the mask row gives `tokens` the `confidences`, the rest spread evenly."""
    p = torch.tensor(confidences)[:, None]
    chosen = one_hot(torch.tensor(tokens), N)
    probs = chosen * p + (1 - chosen) * (1 - p) / (N - 2)
    probs[:, MASK] = 0
    return probs.log()[None]


def no_prompt(rows=1):
    return torch.empty(rows, 0, dtype=torch.long)


def test_equal_confidences_take_the_lower_position():
    priority = torch.tensor([[0.5, 0.9, 0.5, 0.5], [0.1, 0.1, 0.1, 0.1]])
    candidates = torch.tensor([[True, True, True, False], [False, True, True, True]])
    picked = most_confident(priority, candidates, torch.tensor([2, 1]))
    assert picked.tolist() == [[True, True, False, False], [False, True, False, False]]


@pytest.mark.parametrize("count, taken", [(-3, 0), (0, 0), (9, 3)])
def test_most_confident_never_takes_what_is_no_candidate(count, taken):
    candidates = torch.tensor([[True, False, True, True]])
    picked = most_confident(torch.rand(1, 4), candidates, torch.tensor([count]))
    assert picked.sum() == taken and not (picked & ~candidates).any()


@pytest.mark.parametrize(
    "length, block, steps, expected", [(10, 10, 4, [3, 3, 2, 2]), (12, 6, 4, [3, 3, 3, 3]), (9, 3, 6, [2, 1] * 3)]
)
def test_fill_is_even_and_earlier_steps_take_the_remainder(length, block, steps, expected):
    sampler = confidence_sampler(0.0, steps, start=2, length=length, block_length=block)
    canvas = begin(sampler, torch.tensor([[3, 4]]))
    filled = []
    for i in range(steps):
        before = canvas.holes.sum()
        canvas = advance(sampler, canvas, i)
        filled.append(int(before - canvas.holes.sum()))
        assert not canvas.holes[:, : 2 + block * (i // (steps * block // length))].any()
    assert filled == expected and not canvas.holes.any()
    assert canvas.ids[0, :2].tolist() == [3, 4] and (canvas.ids != MASK).all()


def test_one_refinement_worked_out_by_hand():
    # k = 1/2 allows one edit per token filled. Six tokens, three steps, two fills each.
    sampler = confidence_sampler(0.5, 3, start=0, length=6)
    canvas = begin(sampler, no_prompt())
    # Step 0: positions 1 (0.9) and 3 (0.8) are the most confident; no edits at the first step.
    canvas = advance(sampler, canvas, 0, logits_for([1, 1, 1, 1, 1, 1], [0.3, 0.9, 0.3, 0.8, 0.3, 0.3]))
    assert canvas.ids.tolist() == [[0, 1, 0, 1, 0, 0]] and canvas.num_edits.tolist() == [0]
    # Step 1: fills 0 and 2. Position 1 keeps its token (no disagreement), position 3 turns from 1 to 2.
    canvas = advance(sampler, canvas, 1, logits_for([2, 1, 2, 2, 2, 2], [0.7, 0.6, 0.6, 0.5, 0.3, 0.3]))
    assert canvas.ids.tolist() == [[2, 1, 2, 2, 0, 0]] and canvas.num_edits.tolist() == [1]
    # Step 2: budget floor(1 * 6) - 1 = 5, four filled tokens disagree: all four edited, the last two filled.
    canvas = advance(sampler, canvas, 2, logits_for([3, 3, 3, 3, 4, 4], [0.6] * 6))
    assert canvas.ids.tolist() == [[3, 3, 3, 3, 4, 4]] and canvas.num_edits.tolist() == [5]


def test_refinement_takes_the_most_confident_and_carries_the_rest_over():
    # k = 0.2: one edit for every four tokens. Eight tokens, four steps of two fills.
    sampler = confidence_sampler(0.2, 4, start=0, length=8)
    canvas = begin(sampler, no_prompt())
    canvas = advance(sampler, canvas, 0, logits_for([1] * 8, [0.9, 0.9, 0.3, 0.3, 0.3, 0.3, 0.3, 0.3]))
    # After step 1 four are filled and one edit is allowed, but nothing disagrees: it carries over.
    canvas = advance(sampler, canvas, 1, logits_for([1] * 8, [0.9, 0.9, 0.8, 0.8, 0.3, 0.3, 0.3, 0.3]))
    assert canvas.num_edits.tolist() == [0]
    # After step 2 floor(6 / 4) = 1: of four disagreements the one at position 2 (0.7) is the most confident.
    canvas = advance(sampler, canvas, 2, logits_for([2] * 8, [0.5, 0.5, 0.7, 0.5, 0.9, 0.9, 0.3, 0.3]))
    assert canvas.ids.tolist() == [[1, 1, 2, 1, 2, 2, 0, 0]] and canvas.num_edits.tolist() == [1]
    # After step 3 floor(8 / 4) = 2, one is spent.
    canvas = advance(sampler, canvas, 3, logits_for([3] * 8, [0.5, 0.6, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5]))
    assert canvas.ids.tolist() == [[1, 3, 2, 1, 2, 2, 3, 3]] and canvas.num_edits.tolist() == [2]


@pytest.mark.parametrize("block", [256, 64, 32, 16, 8])
def test_the_edit_budget_does_not_depend_on_the_blocks(block):
    # k = 0.1, 256 tokens, 32 steps: floor(256 / 9) = 28, where a floor per block would leave 24, 16 or none.
    torch.manual_seed(0)
    sampler = confidence_sampler(0.1, 32, start=0, length=256, block_length=block)
    canvas = begin(sampler, no_prompt(2))
    for i in range(32):
        canvas = advance(sampler, canvas, i)
    assert canvas.num_edits.tolist() == [28, 28]


def test_budgets_are_those_of_exact_arithmetic():
    filled = torch.arange(1, 4097)
    canvas = Canvas(*(torch.zeros(4096, 0, dtype=kind) for kind in (torch.long, torch.bool, torch.bool)), 0 * filled)
    look = SimpleNamespace(canvas=canvas, step=1, polish_steps_left=0)
    for percent in range(1, 100):
        allowed = BudgetRefinement(percent / 100).allowance(look, _Counts(filled))
        assert allowed.tolist() == [percent * n // (100 - percent) for n in filled.tolist()], percent


class _Counts:
    """Stands in for a (B, C) mask of fills of which only the sums count."""

    def __init__(self, counts):
        self.counts = counts

    def sum(self, dim):
        return self.counts


def test_the_prompt_and_its_literal_mask_are_never_touched():
    prompt = torch.tensor([[MASK, 2, MASK]])
    sampler = confidence_sampler(0.9, 4, start=3, length=8)
    canvas = begin(sampler, prompt)
    for i in range(4):
        canvas = advance(sampler, canvas, i)
    assert canvas.ids[:, :3].equal(prompt) and (canvas.ids[:, 3:] != MASK).all()


def test_the_mask_is_never_predicted_however_likely():
    logits = torch.randn(1, 8, N)
    logits[..., MASK] = 50
    given = logits.clone()
    sampler = confidence_sampler(0.3, 2, start=0, length=8, temperature=1.0)
    canvas = begin(sampler, no_prompt())
    for i in range(2):
        canvas = advance(sampler, canvas, i, logits)
    assert (canvas.ids != MASK).all()
    assert logits.equal(given)


def test_confidence_near_one_keeps_its_order():
    # 1 - 1e-6 against 1 - 4e-7: equal in bfloat16, and through exp(logit - logsumexp) in float32 at logits of 30.
    logits = torch.full((1, 2, N), 30.0)
    logits[0, :, 1] = 30 + torch.tensor([1e6, 2.5e6]).mul(4).log()
    logits[0, :, MASK] = -torch.inf
    sampler = confidence_sampler(0.0, 2, start=0, length=2)
    canvas = advance(sampler, begin(sampler, no_prompt()), 0, logits)
    assert canvas.ids.tolist() == [[MASK, 1]]


def test_random_remasking_is_seeded_and_ignores_confidence():
    def first_filled(seed):
        sampler = confidence_sampler(
            0.0, 8, start=0, length=8, remasking="random", generator=torch.Generator().manual_seed(seed)
        )
        canvas = advance(sampler, begin(sampler, no_prompt()), 0, logits_for([1] * 8, [0.9] + [0.3] * 7))
        return int((~canvas.holes).nonzero()[0, 1])

    assert first_filled(3) == first_filled(3)
    assert len({first_filled(seed) for seed in range(40)}) > 4  # all 40 in 4 of 8 cells: 70 * 2^-40


def test_mixing_ratio_one_refines_without_limit():
    sampler = confidence_sampler(1.0, 4, start=0, length=8)
    canvas = begin(sampler, no_prompt())
    for i in range(4):
        canvas = advance(sampler, canvas, i, logits_for([i + 1] * 8, [0.8] * 8))
    assert canvas.ids.tolist() == [[4] * 8] and canvas.num_edits.tolist() == [2 + 4 + 6]


@pytest.mark.parametrize("k", [0.0, 1e-3, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("schedule", [LinearSchedule(), CosineSchedule()])
@pytest.mark.parametrize("steps", [1, 4, 32])
def test_ancestral_sampling_reverses_the_forward_process(k, schedule, steps):
    # With p the true distribution of independent tokens, the reverse chain ends in p exactly, at any number of steps.
    generator = torch.Generator().manual_seed(int(k * 1000) + steps)
    kernel = NoiseKernel(N, k, None if k == 1 else MASK)
    p = torch.tensor([0.0, 0.5, 0.3, 0.15, 0.04, 0.01], dtype=torch.float64)
    rows, length = 50, 400
    sampler = AncestralSampler(StationaryProcess(kernel, schedule), steps, start=0, length=length, generator=generator)
    canvas = begin(sampler, no_prompt(rows))
    for i in range(steps):
        canvas = advance(sampler, canvas, i, p.log().expand(rows, length, N))
    counts = canvas.ids.flatten().bincount(minlength=N).double()
    expected = p * rows * length
    assert counts[0] == 0
    chi_square = ((counts - expected)[1:] ** 2 / expected[1:]).sum()
    assert chi_square < 33.4  # 4 degrees of freedom: false alarm 1e-6 per case, 3e-5 for all


def test_ancestral_edits_are_token_to_token_changes():
    kernel = NoiseKernel(N, 1.0)
    sampler = AncestralSampler(
        StationaryProcess(kernel, LinearSchedule()), 1, start=1, length=500, generator=torch.Generator().manual_seed(0)
    )
    canvas = begin(sampler, torch.tensor([[5]]))
    before = canvas.ids
    canvas = advance(sampler, canvas, 0, torch.zeros(1, 500, N))
    assert canvas.num_edits.item() == (canvas.ids != before).sum().item() > 300
    assert canvas.ids[0, 0] == 5


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"steps": 0}, r"steps=0 must be a positive integer"),
        ({"length": -4}, r"max_new_tokens=-4 must be a positive integer"),
        ({"block_length": 0}, r"block_length=0 must be a positive integer"),
        ({"steps": 9}, r"steps=9 is more than max_new_tokens=8.*use steps=8"),
        ({"steps": 2, "block_length": 3}, r"steps=2 is too few for the 3 blocks of 3 tokens.*steps=3 or more"),
        ({"temperature": -1.0}, r"temperature=-1.0 must not be negative"),
        ({"remasking": "entropy"}, r"remasking='entropy' is not known.*low_confidence"),
    ],
)
def test_confidence_sampler_refuses(kwargs, message):
    with pytest.raises(ValueError, match=message):
        confidence_sampler(**{"mixing_ratio": 0.1, "steps": 4, "start": 0, "length": 8, **kwargs})


def test_ancestral_sampler_refuses_zero_temperature():
    with pytest.raises(ValueError, match="temperature=0 must be positive.*sampler='confidence'"):
        AncestralSampler(StationaryProcess(NoiseKernel(N, 1.0), LinearSchedule()), 4, start=0, length=8, temperature=0)


def test_late_ancestral_steps_need_few_logits():
    # A token stays with probability a_ts beta_s / beta_t at least: of 4096 positions and 256 steps few ask for p.
    kernel = NoiseKernel(N, 0.1, MASK)
    sampler = AncestralSampler(StationaryProcess(kernel, LinearSchedule()), 256, start=0, length=4096)
    canvas = begin(sampler, no_prompt())
    asked = []
    for i in range(256):
        asked.append(int(sampler.request(canvas, i).mask.sum()))
        canvas = advance(sampler, canvas, i)
    assert sum(asked) / (256 * 4096) < 0.05
    assert all(count < 4096 / 4 for count in asked[:-8])
