"""`reference_compat=True` against recordings of the released code and against a plain restatement of it."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from released import IntegerNetwork, agrees, audit_setting, integer_model, recorded_network, released_generation
from safetensors.torch import load_file

from xdlm_hf import LogLinearSchedule, NoiseKernel, StationaryProcess, XDLMGenerationConfig
from xdlm_hf.generation.released import ReferenceAncestralSampler, ReferenceConfidenceSampler, edit_budget

FIXTURES = Path(__file__).parents[1] / "fixtures"
CASES = json.loads((FIXTURES / "released-sampler" / "cases.json").read_text())
MASK, N = 47, 48


@pytest.fixture(scope="module")
def recorded():
    return load_file(FIXTURES / "released-sampler" / "expected.safetensors")


def recorded_options(index):
    return {name: value for name, value in CASES[index].items() if name not in ("dtype", "padded")}


# ---------------------------------------------------------------------------------------------------------------------
# The confidence sampler, token for token


@pytest.mark.parametrize("index", range(len(CASES)))
def test_the_recorded_generations(recorded, index):
    model = integer_model(recorded_network, N, MASK, getattr(torch, CASES[index]["dtype"]))
    prompt = {"input_ids": recorded[f"in_{index}"], "attention_mask": recorded[f"mask_{index}"]}
    sequences = model.generate(**prompt, **recorded_options(index), reference_compat=True)
    assert sequences.equal(recorded[f"out_{index}"])


@pytest.mark.parametrize("index", range(len(CASES)))
def test_the_restatement_gives_the_recorded_generations(recorded, index):
    sequences, _ = released_generation(
        recorded_network,
        recorded[f"in_{index}"],
        recorded[f"mask_{index}"],
        MASK,
        **recorded_options(index),
        dtype=getattr(torch, CASES[index]["dtype"]),
    )
    assert sequences.equal(recorded[f"out_{index}"])


@pytest.mark.parametrize("first", range(0, 80, 10))
def test_a_sample_of_the_audit(first):
    disagreeing = [index for index in range(first, first + 10) if not agrees(audit_setting(index))]
    assert not disagreeing


@pytest.mark.slow
def test_the_whole_audit():
    """300 settings in float32 and 300 in bfloat16; about half a minute."""
    disagreeing = [index for index in range(600) if not agrees(audit_setting(index))]
    assert not disagreeing


def test_more_steps_than_tokens_only_edit():
    # 12 steps for 8 tokens: the last four of the block fill nothing, and may still edit.
    ids = torch.tensor([[5, 6, 7], [8, 9, 10]])
    setting = {"steps": 12, "max_new_tokens": 8, "block_length": 8, "mixing_ratio": 0.5}
    setting |= {"mask_token_id": 15, "attention_mask": torch.ones_like(ids)}
    network = IntegerNetwork(16, 15)
    assert agrees({"network": network, "ids": ids, "dtype": torch.float32, **setting})


def test_what_a_block_leaves_of_its_budget_is_dropped():
    # Two blocks of 8 in two steps each, k = 0.3: floor(0.3 / 0.7 * 8) = 3 edits for each block. The first block finds
    # nothing to edit; in the second every filled token disagrees, and 3 are edited, not 6.
    sampler = ReferenceConfidenceSampler(2, 0.3, 4, start=0, length=16, block_length=8)
    everything = torch.ones(1, 16, dtype=torch.bool)
    canvas = sampler.begin(torch.zeros(1, 16, dtype=torch.long), everything)
    edits = []
    for i in range(4):
        logits = F.one_hot(torch.full((1, 16), i // 2), 3).float()
        canvas = sampler.step(canvas, logits, sampler.request(canvas, i))
        edits.append(canvas.num_edits.item())
    assert edits == [0, 0, 0, 3]


def test_budgets_round_like_float32():
    """Other than in float64 for about half of all k: 0.01 / 0.99 * 99 is 1, and in float32 just below it."""
    tokens, differing = range(1, 257), 0
    for percent in range(1, 96):
        k = percent / 100
        budgets = [edit_budget(n, k, torch.device("cpu")).item() for n in tokens]
        expected = [int(np.floor(np.float32(n) * np.float32(k) / np.float32(1 - k))) for n in tokens]
        assert budgets == expected
        differing += budgets != [math.floor(n * (k / (1 - k))) for n in tokens]
    assert differing > 30 and edit_budget(99, 0.01, torch.device("cpu")).item() == 0


def test_guidance_hides_padding_and_shows_filled_masks():
    """Tokens that were not [MASK] at the start are hidden, padding too; a mask of the prompt, once filled, is not."""
    seen = []

    def network(ids, attention_mask=None):
        seen.append((ids, attention_mask))
        return IntegerNetwork(16, 15)(ids, attention_mask)

    ids, attention_mask = torch.tensor([[4, 15, 6]]), torch.tensor([[0, 1, 1]])
    options = {"steps": 3, "max_new_tokens": 6, "mixing_ratio": 0.0, "cfg_scale": 1.0, "output_history": True}
    output = integer_model(network, 16, 15, torch.float32).generate(
        ids, attention_mask=attention_mask, **options, reference_compat=True, return_dict_in_generate=True
    )
    assert output.num_forward_passes == 6 and len(seen) == 3  # two texts, one batch
    for (texts, mask), before in zip(seen, output.history, strict=False):
        assert texts[0].equal(before[0])
        assert texts[1].tolist() == [15, before[0, 1], 15, *before[0, 3:].tolist()]
        assert mask.tolist() == [[0] + [1] * 8] * 2


def test_guidance_without_an_attention_mask_attends_to_everything():
    model, ids = integer_model(IntegerNetwork(16, 15), 16, 15, torch.bfloat16), torch.tensor([[1, 2, 3]])
    options = {"steps": 4, "max_new_tokens": 8, "mixing_ratio": 0.3, "cfg_scale": 1.0, "reference_compat": True}
    assert model.generate(ids, **options).equal(model.generate(ids, attention_mask=torch.ones_like(ids), **options))


# ---------------------------------------------------------------------------------------------------------------------
# In distribution


def test_draws_in_bfloat16_have_the_exact_distribution():
    """100,000 draws at temperature 0.3 of bfloat16 logits: the top token within 5 standard errors of its probability,
    a false alarm once in 1.7e6 runs. Divided in bfloat16 the logits would give another one, 30 of these errors away."""
    logits = torch.tensor([20.125, 19.75, 19.0], dtype=torch.bfloat16)
    exact = (logits.double() / 0.3).softmax(-1)[0].item()  # 0.763; divided in bfloat16: 0.719
    sampler = ReferenceConfidenceSampler(2, 0.0, 1, 0, 1000, temperature=0.3)
    drawn = sampler.predict(logits.expand(100, 1000, 3), torch.zeros(100, 1000, dtype=torch.long))[0]
    error = math.sqrt(exact * (1 - exact) / drawn.numel())
    assert abs((drawn == 0).double().mean().item() - exact) < 5 * error
    assert abs((logits / 0.3).double().softmax(-1)[0].item() - exact) > 30 * error


def test_random_remasking_fills_every_hole_in_any_order():
    model = integer_model(IntegerNetwork(16, 15, mask_bonus=-20.0), 16, 15, torch.bfloat16)
    options = {"steps": 8, "max_new_tokens": 8, "mixing_ratio": 0.0, "remasking": "random", "output_history": True}
    firsts = set()
    for seed in range(40):
        output = model.generate(**options, seed=seed, reference_compat=True, return_dict_in_generate=True)
        assert (output.sequences != 15).all()
        firsts.add(int((output.history[1] != 15).nonzero()[0, 1]))
    assert len(firsts) > 4  # all 40 in 4 of 8 columns: 70 * 2^-40


# ---------------------------------------------------------------------------------------------------------------------
# The ancestral chain


def test_the_chain_takes_one_pass_more_than_steps_and_ends_clean():
    model = integer_model(IntegerNetwork(16, 15), 16, 15, torch.float32)
    options = {"sampler": "ancestral", "steps": 4, "max_new_tokens": 32, "mixing_ratio": 0.1, "seed": 0}
    output = model.generate(**options, reference_compat=True, return_dict_in_generate=True)
    assert output.num_forward_passes == 5 and (output.sequences != 15).all()


def test_the_chain_counts_padding_in_positions():
    """The model refuses position ids, which the default sampler passes for padded rows."""
    model = integer_model(IntegerNetwork(16, 15), 16, 15, torch.float32)
    prompt = {"input_ids": torch.tensor([[3, 4]]), "attention_mask": torch.tensor([[0, 1]])}
    options = {"sampler": "ancestral", "steps": 2, "max_new_tokens": 8, "mixing_ratio": 0.1, "seed": 0}
    assert model.generate(**prompt, **options, reference_compat=True).shape == (1, 10)
    with pytest.raises(ValueError, match="no position ids"):
        model.generate(**prompt, **options)


def test_the_times_of_the_chain():
    sampler = ReferenceAncestralSampler(StationaryProcess(NoiseKernel(16, 0.1, 15), LogLinearSchedule()), 4, 0, 8)
    times = (sampler.times(i) for i in range(sampler.steps))
    rates = torch.tensor([[float(sampler.process.alpha(time)) for time in both] for both in times])
    times = 1 - torch.arange(5, dtype=torch.float64) * (1 - 1e-5) / 4
    expected = 1 - 0.999 * torch.stack([times[1:], times[:-1]], 1)
    torch.testing.assert_close(rates[:4].double(), expected, rtol=0, atol=2e-7)
    assert rates[4, 0] == 1 and abs(rates[4, 1] - (1 - 0.999e-5)) < 1e-7


# ---------------------------------------------------------------------------------------------------------------------
# What the released code does not do


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"remasking": "random", "mixing_ratio": 0.1},
            r"remasking='random' with mixing_ratio=0.1 raises an error in the released sampler",
        ),
        ({"mixing_ratio": 1.0}, r"with mixing_ratio=1: .* divides by 0"),
        ({"temperature": 1.0, "top_k": 5}, r"released sampler, .*, has no option top_k=5"),
        ({"temperature": 1.0, "top_p": 0.5}, r"released sampler, .*, has no option top_p=0.5"),
        ({"use_cache": "dual"}, r"released sampler, .*, has no option use_cache='dual'"),
        ({"sampler": "ancestral", "temperature": 0.5}, r"released sampler, .*, has no option temperature=0.5"),
        ({"sampler": "ancestral", "cfg_scale": 1.0}, r"released sampler, .*, has no option cfg_scale=1.0"),
        ({"steps": 3, "block_length": 4}, r"steps=3 does not spread evenly over the 2 blocks"),
        ({"block_length": 3}, r"block_length=3 does not divide max_new_tokens=8"),
    ],
)
def test_what_the_released_code_does_not_do_is_refused(options, message):
    model = integer_model(None, 16, 15, torch.float32)  # calling it would be a TypeError
    with pytest.raises(ValueError, match=message):
        model.generate(**{"steps": 4, "max_new_tokens": 8, **options}, reference_compat=True)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"mixing_ratio": 1.0}, r"mixing_ratio=1.0 must lie in \[0, 1\)"),
        ({"temperature": -1.0}, r"temperature=-1.0 must not be negative"),
        ({"remasking": "random", "mixing_ratio": 0.1}, r"remasking='random' is not released; .*with k = 0"),
        ({"remasking": "entropy"}, r"remasking='entropy' is not released"),
        ({"steps": 0}, r"steps=0 must be a positive integer"),
    ],
)
def test_the_sampler_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        ReferenceConfidenceSampler(
            **{"mask_token_id": 0, "mixing_ratio": 0, "steps": 4, "start": 0, "length": 8, **options}
        )


@pytest.mark.parametrize(
    "stored, call",
    [
        ({"remasking": "random"}, {"mixing_ratio": 0.1}),
        ({"temperature": 0.0, "top_k": 5}, {"mixing_ratio": 0.1}),
        ({"temperature": 0.5, "cfg_scale": 1.0}, {"sampler": "ancestral", "mixing_ratio": 0.1, "seed": 0}),
    ],
)
def test_what_a_checkpoint_stores_gives_way(stored, call):
    model = integer_model(IntegerNetwork(16, 15), 16, 15, torch.float32)
    options = {"steps": 4, "max_new_tokens": 8, "reference_compat": True, **call}
    without = model.generate(**options)
    model.generation_config = XDLMGenerationConfig(**stored)
    assert model.generate(**options).equal(without)
