"""Unconditional text of the recorded DiT: the released chains token for token, and what their float32 noise does."""

import math
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from xdlm_hf import (
    AncestralSampler,
    DiTConfig,
    DiTForDiffusionLM,
    GIDDProcess,
    LogLinearSchedule,
    NoiseKernel,
    StationaryProcess,
)
from xdlm_hf.generation import released
from xdlm_hf.generation.released import ReferenceAncestralSampler

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
from measure import peak_bytes  # noqa: E402

FIXTURE = Path(__file__).parents[1] / "fixtures" / "tiny-dit"
EXPECTED = load_file(FIXTURE / "expected.safetensors")
SYSTEMS = {
    "mdlm": {"mixing_ratio": 0.0},
    "xdlm": {"mixing_ratio": 0.1},
    "udlm": {"mixing_ratio": 1.0},
    "gidd": {"noise_process": "gidd"},
}


def recorded(**config):
    return DiTForDiffusionLM.from_pretrained(FIXTURE, **config).eval()


# --- the chains -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("system", SYSTEMS)
def test_the_released_chain_token_for_token(system):
    """Prior, eight steps and the additional pass from the seed of the recording: the same tokens in all ten states."""
    model, states = recorded(**SYSTEMS[system]), EXPECTED[f"samples.{system}"]
    options = {"steps": 8, "max_new_tokens": 24, "num_return_sequences": 2, "reference_compat": True}
    output = model.generate(**options, seed=7, output_history=True, return_dict_in_generate=True)
    assert len(output.history) == len(states) == 10 and output.num_forward_passes == 9
    for i, (ours, theirs) in enumerate(zip(output.history, states, strict=True)):
        assert ours.equal(theirs), f"state {i}"
    assert output.sequences.equal(states[-1])
    torch.manual_seed(7)  # the recording's own source of randomness
    assert model.generate(**options).equal(states[-1])


def test_the_released_chain_keeps_its_schedule():
    """A checkpoint that was trained further with another schedule is sampled as the release samples every one."""
    options = {"steps": 8, "max_new_tokens": 24, "num_return_sequences": 2, "reference_compat": True, "seed": 7}
    model = recorded(**SYSTEMS["xdlm"], noise_schedule="cosine")
    assert model.generate(**options).equal(EXPECTED["samples.xdlm"][-1])


@pytest.mark.parametrize("system", SYSTEMS)
def test_the_exact_sampler_is_the_default_and_takes_as_many_passes_as_steps(system):
    model = recorded(**SYSTEMS[system])
    options = {"steps": 8, "max_new_tokens": 24, "num_return_sequences": 3, "seed": 0, "return_dict_in_generate": True}
    output = model.generate(**options)
    assert output.sequences.shape == (3, 24) and output.num_forward_passes <= 8
    if system != "udlm":  # k = 1 excludes no row
        assert not output.sequences.eq(60).any()
    prompt = torch.tensor([[1, 2, 3]])
    continued = model.generate(prompt, steps=4, max_new_tokens=8, seed=0)
    assert continued.shape == (1, 11) and continued[:, :3].equal(prompt)


def test_times_are_refused_with_the_released_chain():
    with pytest.raises(ValueError, match="takes timesteps, and .*reference_compat=True gives none"):
        recorded(time_conditioning=True).generate(steps=2, max_new_tokens=8, reference_compat=True)


# --- exact draws ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_step_has_the_frequencies_of_the_posterior(system):
    """20,000 rows from one noisy text, one step: chi-square of each position against the dense posterior.

    Tokens expected less than ten times are counted together. With d degrees of freedom the statistic exceeds
    d + 6 sqrt(2 d) + 20 less than once in 1e8 positions.
    """
    rows, model = 20_000, recorded(**SYSTEMS[system])
    process, z_t = model.noise_process(), EXPECTED["zt_mdlm" if system in ("mdlm", "gidd") else "zt"][:1, :6]
    sampler = AncestralSampler(process, 4, 0, 6, generator=torch.Generator().manual_seed(0))
    everything = torch.ones(rows, 6, dtype=torch.bool)
    canvas = sampler.begin(z_t.expand(rows, -1), ~everything)
    canvas = type(canvas)(**{**vars(canvas), "generated": everything})
    with torch.no_grad():
        logits = model(z_t).logits
    request = sampler.request(canvas, 1)
    after = sampler.step(canvas, [logits.expand(rows, -1, -1)[request.mask]], request).ids
    s, t = sampler.times(1)
    noise = process.noise(s)
    for token_id in noise.absorbing_ids:
        logits[..., token_id] = -torch.inf
    probs = process.posterior(logits.double().softmax(-1), z_t, s, t)[0]
    for position in range(6):
        expected, counts = rows * probs[position], torch.bincount(after[:, position], minlength=61).double()
        assert (counts[expected == 0] == 0).all()
        common = expected >= 10
        expected = torch.cat([expected[common], expected[~common].sum()[None]])
        counts = torch.cat([counts[common], counts[~common].sum()[None]])
        statistic = ((counts - expected) ** 2 / expected.clamp_min(1e-9)).sum().item()
        freedom = len(counts) - 1
        assert statistic < freedom + 6 * math.sqrt(2 * freedom) + 20, f"position {position}"


def test_no_tensor_of_all_logits_is_made():
    """16 rows of 64 tokens, 16,384 rows of the output layer: less than half of one such tensor, text and all."""
    torch.manual_seed(0)
    sizes = {"hidden_dim": 16, "cond_dim": 8, "n_blocks": 1, "n_heads": 1, "model_length": 64, "vocab_size": 16_384}
    for noise in ({"mixing_ratio": 0.1}, {"noise_process": "gidd", "p_uniform": 0.1}):
        model = DiTForDiffusionLM(DiTConfig(**sizes, **noise)).eval()
        options = {"steps": 2, "max_new_tokens": 64, "num_return_sequences": 16, "seed": 0}
        assert peak_bytes(partial(model.generate, **options)) < 16 * 64 * 16_384 * 4 / 2


# --- float32 noise --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [32, 1024])
@pytest.mark.parametrize("p", [1e-4, 1e-5])
def test_float32_noise_starves_rare_tokens_by_the_closed_form(monkeypatch, steps, p):
    """First step from [MASK]: a token of odds r against staying keeps y / (e^y - 1) of its probability, y = 2^-24 / r.

    A float32 number near 1 is 1 - j 2^-24, so the token's exponential is j 2^-24, j = 1, 2, ...; only the first J of
    these can win, and the test draws among them, which makes the win J^-1 2^24 times as frequent. 400,000 draws, bound
    six standard errors: a false alarm once in 5e8.
    """
    process = StationaryProcess(NoiseKernel(3, 0.0, 2), LogLinearSchedule())
    sampler = ReferenceAncestralSampler(process, steps, 0, 400_000)
    canvas = sampler.begin(torch.full((1, 400_000), 2), torch.ones(1, 400_000, dtype=torch.bool))
    s, t = sampler.times(0)
    alpha_s, alpha_t = process.alpha(s).item(), process.alpha(t).item()
    odds = (alpha_s - alpha_t) / (1 - alpha_s)
    r, largest = p * odds, max(8, math.ceil(30 * p * odds * 2**24))
    # Staying must be the winner: what is left of p is on a token that is never drawn.
    posterior = process.posterior
    monkeypatch.setattr(process, "posterior", lambda *args: posterior(*args).index_fill(-1, torch.tensor(0), 0.0))

    def near_one(shape, generator, device, dtype):
        u = torch.rand(shape, dtype=dtype)
        u[..., 1] = 1 - torch.randint(1, largest + 1, shape[:-1]) * 2.0**-24
        return u

    monkeypatch.setattr(released, "uniform", near_one)
    logits = torch.log(torch.tensor([1 - p, p, 1.0]))
    after = sampler.step(canvas, [logits.expand(400_000, 3)], sampler.request(canvas, 0)).ids
    share = largest * 2**-24
    won = (after == 1).double().mean().item() * share
    y = 2**-24 / r
    expected = 2**-24 / math.expm1(y)
    error = share * math.sqrt(max(expected / share, 1e-5) / 400_000)
    assert abs(won - expected) < 6 * error
    assert abs(won - r) > 20 * error or y < 0.5  # the exact sampler's share is another one


def test_gidd_with_a_uniform_share_may_change_tokens():
    """p_u = 0, as released, never leaves a token; with a share the chain does. No [MASK] is left either way."""
    for p_uniform, edits in ((0.0, False), (0.5, True)):
        model = recorded(noise_process="gidd", p_uniform=p_uniform)
        assert isinstance(model.noise_process(), GIDDProcess)
        options = {"steps": 16, "max_new_tokens": 24, "num_return_sequences": 8, "seed": 0}
        for compat in (False, True):
            output = model.generate(**options, reference_compat=compat, return_dict_in_generate=True)
            assert bool(output.num_edits.sum()) == edits and not output.sequences.eq(60).any()
