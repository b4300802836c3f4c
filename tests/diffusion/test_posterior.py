"""The reverse step, dense and drawn, against Bayes' rule on explicit matrices (Eqs. 2, 11, 16, 18).

Each frequency test has the false-alarm probability FALSE_ALARM: that is how often the right law would fail it if the
seed were drawn anew.
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from reference import (
    MASK_IDS,
    MIXING_RATIOS,
    VOCABULARY,
    Noise,
    batch_posterior,
    bayes_posterior,
    binomial_bound,
    chi_square_p_value,
    clean_distribution,
    draw_case,
    marginal,
    mdlm_posterior,
    one_hot,
    udlm_posterior,
)
from xdlm_hf.diffusion.categorical import _BLOCK_ELEMENTS
from xdlm_hf.diffusion.noise import NoiseKernel
from xdlm_hf.diffusion.reverse import posterior, sample_posterior
from xdlm_hf.diffusion.schedules import get_schedule

FALSE_ALARM = 1e-6
DRAWS = 40_000
GRID = [(k, m) for k in MIXING_RATIOS for m in MASK_IDS]
N = VOCABULARY


def kernel_of(case):
    return NoiseKernel(N, case.k, case.m)


def counts(ids, vocab_size=N):
    return ids.reshape(-1).bincount(minlength=vocab_size)


# --- dense ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["linear", "cosine"])
@pytest.mark.parametrize("k, m", GRID)
def test_equals_the_oracle(k, m, name):
    case, schedule = draw_case(k, m), get_schedule(name)
    (alpha_s, _), (alpha_t, _) = schedule(case.s), schedule(case.t)
    p = clean_distribution(case.logits, case.noise)
    probs = posterior(p, case.z_t, alpha_s, alpha_t, kernel_of(case))
    torch.testing.assert_close(
        probs, batch_posterior(p, case.z_t, alpha_s, alpha_t, case.noise), rtol=1e-12, atol=1e-15
    )
    assert probs.dtype == torch.float64
    single = posterior(p.float(), case.z_t, alpha_s, alpha_t, kernel_of(case))
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), probs, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("k, m", GRID)
def test_marginalises_back_to_the_forward_process(k, m):
    """sum over z_t of q(z_s | z_t, x) q(z_t | x) = q(z_s | x), for one-hot x and for a soft x."""
    noise, kernel = Noise.mixing(N, k, m), NoiseKernel(N, k, m)
    K = noise.kernel()
    every_z = torch.arange(N)[None]
    soft = clean_distribution(torch.linspace(-2, 2, N, dtype=torch.float64), noise)
    clean = one_hot((m + 1) % N, N)
    for x in (clean, soft):
        for alpha_s, alpha_t in ((0.9, 0.2), (1.0, 0.5), (0.3, 0.0), (0.4, 0.4), (1.0, 0.0), (1.0, 1.0)):
            steps = torch.tensor([[alpha_s], [alpha_t]], dtype=torch.float64)
            backward = posterior(x.expand(1, N, N), every_z, *steps, kernel)[0]  # row z_t: law of z_s
            assert torch.isfinite(backward).all()  # z_t of probability zero included
            torch.testing.assert_close(
                backward.T @ marginal(x, alpha_t, K), marginal(x, alpha_s, K), rtol=1e-12, atol=1e-15
            )


@given(
    k=st.floats(0, 1),
    m=st.integers(0, N - 1),
    alphas=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    z_t=st.integers(0, N - 1),
    scale=st.floats(0, 50),
    seed=st.integers(0, 100),
)
def test_is_a_distribution(k, m, alphas, z_t, scale, seed):
    """Rows sum to 1 and hold nothing negative, also where a probability is exactly zero: they can be drawn from."""
    noise = Noise.mixing(N, k, m)
    logits = scale * torch.randn(1, 1, N, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    p = clean_distribution(logits, noise)
    alpha_t, alpha_s = (torch.tensor([a], dtype=torch.float64) for a in sorted(alphas))
    for dtype, tolerance in ((torch.float64, 1e-14), (torch.float32, 1e-6)):
        probs = posterior(p.to(dtype), torch.tensor([[z_t]]), alpha_s, alpha_t, NoiseKernel(N, k, m))
        assert (probs >= 0).all()
        assert (probs.sum(-1) - 1).abs().max() < tolerance


@pytest.mark.parametrize("m", MASK_IDS)
def test_limits_are_mdlm_and_udlm(m):
    """k = 0 is Eq. 16, k = 1 is Eq. 18, cell by cell."""
    for k in (0.0, 1.0):
        case = draw_case(k, m)
        alpha_s, alpha_t = 1 - case.s, 1 - case.t
        p = clean_distribution(case.logits, case.noise)
        probs = posterior(p, case.z_t, alpha_s, alpha_t, kernel_of(case))
        for b in range(4):
            for i in range(5):
                cell = (p[b, i], int(case.z_t[b, i]), float(alpha_s[b]), float(alpha_t[b]))
                expected = mdlm_posterior(*cell, m) if k == 0 else udlm_posterior(*cell)
                torch.testing.assert_close(probs[b, i], expected, rtol=1e-12, atol=1e-15)


def test_several_special_tokens():
    special = {4: 0.5, 1: 0.25}
    noise, kernel = Noise.several(N, special), NoiseKernel.from_special_weights(N, special)
    generator = torch.Generator().manual_seed(1)
    p = clean_distribution(torch.randn(2, N, N, dtype=torch.float64, generator=generator), noise)
    z_t = torch.arange(N).expand(2, N)
    alpha_s, alpha_t = torch.tensor([0.9, 0.5]).double(), torch.tensor([0.3, 0.45]).double()
    torch.testing.assert_close(
        posterior(p, z_t, alpha_s, alpha_t, kernel),
        batch_posterior(p, z_t, alpha_s, alpha_t, noise),
        rtol=1e-12,
        atol=1e-15,
    )


@pytest.mark.parametrize("shape", [(2,), (2, 1), ()])
def test_rates_may_be_columns_or_scalars(shape):
    p = torch.full((2, 3, N), 1 / N, dtype=torch.float64)
    z_t, kernel = torch.tensor([[0, 1, 2], [3, 4, 5]]), NoiseKernel(N, 1.0)
    alpha_s, alpha_t = torch.full(shape, 0.7).double(), torch.full(shape, 0.2).double()
    expected = batch_posterior(p, z_t, torch.tensor(0.7), torch.tensor(0.2), Noise(N, 1.0, {}))
    torch.testing.assert_close(posterior(p, z_t, alpha_s, alpha_t, kernel), expected, rtol=1e-7, atol=0)


# --- drawn ----------------------------------------------------------------------------------------------------


def draw(case_logits, z_t, alpha_s, alpha_t, kernel, n=DRAWS, seed=0):
    """n independent draws of one token: z_s (1, n)."""
    return sample_posterior(
        case_logits.expand(1, n, -1),
        torch.full((1, n), z_t),
        torch.tensor([alpha_s], dtype=torch.float64),
        torch.tensor([alpha_t], dtype=torch.float64),
        kernel,
        generator=torch.Generator().manual_seed(seed),
    )


@pytest.mark.parametrize("k, m", GRID)
def test_draws_follow_the_dense_posterior(k, m):
    """Four steps from [MASK], from a likely and from an unlikely token: 12 chi-square tests per case."""
    noise, kernel = Noise.mixing(N, k, m), NoiseKernel(N, k, m)
    logits = torch.linspace(-2, 2, N).roll(m + 3)
    p = clean_distribution(logits, noise)
    ordinary = [e for e in range(N) if e != m]
    likely, unlikely = max(ordinary, key=lambda e: p[e]), min(ordinary, key=lambda e: p[e])
    for alpha_s, alpha_t in ((0.9, 0.3), (1.0, 0.9), (0.5, 0.0), (0.05, 0.01)):
        for z_t in (m, likely, unlikely):
            law = bayes_posterior(p, z_t, alpha_s, alpha_t, noise.kernel()).clamp_min(0)
            if not torch.isfinite(law).all():  # k = 0 and alpha_t = 0: an unmasked z_t cannot occur
                continue
            z_s = draw(logits, z_t, alpha_s, alpha_t, kernel, seed=z_t)
            assert z_s.shape == (1, DRAWS) and z_s.dtype == torch.int64
            law = torch.where(law < 1e-15, 0.0, law)
            assert chi_square_p_value(counts(z_s), law) > FALSE_ALARM, (z_t, alpha_s, alpha_t)


def test_draws_with_several_special_tokens():
    special = {4: 0.5, 1: 0.25}
    noise, kernel = Noise.several(N, special), NoiseKernel.from_special_weights(N, special)
    logits = torch.linspace(-2, 2, N)
    p = clean_distribution(logits, noise)
    for z_t in range(N):
        law = bayes_posterior(p, z_t, 0.6, 0.3, noise.kernel())
        z_s = draw(logits, z_t, 0.6, 0.3, kernel, n=4 * DRAWS, seed=z_t)
        assert chi_square_p_value(counts(z_s), law) > FALSE_ALARM


@pytest.mark.parametrize("alpha_s, alpha_t, expected", [(0.99, 0.98, 5.4e-4), (0.999, 0.998, 5.4e-5)])
def test_rare_uniform_branch_is_drawn_at_its_rate(alpha_s, alpha_t, expected):
    """From [MASK] at k = 0.1 with p all on one token, others come from the uniform branch alone.

    Their probability is b_ts r(m) beta_s (k/N) 5 / (beta_t r(m)) = b_ts beta_s k (5/7) / beta_t. Sampling with float32
    Gumbel noise loses a third of such a branch; at 4e6 draws that shows at 1e-20.
    """
    n, k, m = 4_000_000, 0.1, 0
    logits = torch.full((N,), -50.0)
    logits[3] = 0.0
    rate = (alpha_s - alpha_t) / alpha_s * (1 - alpha_s) * k * 5 / 7 / (1 - alpha_t)
    assert 0.5 * expected < rate < expected
    z_s = draw(logits, m, alpha_s, alpha_t, NoiseKernel(N, k, m), n=n)
    others = int(((z_s != m) & (z_s != 3)).sum())
    assert binomial_bound(others, n, rate) > FALSE_ALARM


def test_tail_of_a_large_vocabulary_is_drawn_at_its_rate():
    """4000 tokens share a probability of 1e-2; half of them lie before the likely token, half after."""
    vocab_size, n, top = 4001, 1000, 2000
    tail = 1e-2
    logits = torch.zeros(vocab_size)
    logits[top] = torch.log(torch.tensor((vocab_size - 1) * (1 - tail) / tail))
    kernel = NoiseKernel(vocab_size, 1.0)
    hits = torch.zeros(2)
    for seed in range(40):  # alpha_s = 1, alpha_t = 0: every position draws from p
        z_s = draw(logits, 0, 1.0, 0.0, kernel, n=n, seed=seed)
        hits += torch.tensor([(z_s < top).sum(), (z_s > top).sum()])
    for side in hits:
        assert binomial_bound(int(side), 40 * n, tail / 2) > FALSE_ALARM


@pytest.mark.parametrize("k", MIXING_RATIOS)
def test_prior_to_data_in_one_step_draws_from_p(k):
    """alpha_s = 1, alpha_t = 0: z_t tells nothing, z_s ~ p, and no [MASK] is left when k < 1."""
    m = 3
    noise, kernel = Noise.mixing(N, k, m), NoiseKernel(N, k, m)
    logits = torch.linspace(1, -1, N)
    for z_t in (m, 0) if k > 0 else (m,):
        z_s = draw(logits, z_t, 1.0, 0.0, kernel)
        assert chi_square_p_value(counts(z_s), clean_distribution(logits, noise)) > FALSE_ALARM


@pytest.mark.parametrize("k", [k for k in MIXING_RATIOS if k < 1])
def test_last_step_leaves_no_mask(k):
    for alpha_t in (0.0, 0.5, 0.999):
        z_s = draw(torch.zeros(N), 3, 1.0, alpha_t, NoiseKernel(N, k, 3))
        assert not (z_s == 3).any()


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("k, m", GRID)
def test_no_time_no_change(k, m, alpha):
    z_t = torch.arange(N).repeat(1, 50)
    logits = torch.randn(1, 50 * N, N)
    step = torch.tensor([alpha])
    assert torch.equal(sample_posterior(logits, z_t, step, step, NoiseKernel(N, k, m)), z_t)


def test_unmasked_tokens_stay_for_certain_at_k_0():
    """r(z_t) = 0: even where the network gives the token no probability at all."""
    logits = torch.full((N,), 0.0)
    logits[2] = -1e4
    assert (draw(logits, 2, 0.9, 0.1, NoiseKernel(N, 0.0, 0)) == 2).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("k", [0.0, 0.1, 0.9])
def test_mask_row_is_excluded_whatever_its_logit(k, dtype):
    """The same seed gives the same draws with the mask logit at -3 and at the largest value around."""
    m, kernel = 2, NoiseKernel(N, k, 2)
    z_t = torch.randint(0, N, (2, 4000), generator=torch.Generator().manual_seed(3))
    logits = torch.randn(2, 4000, N, generator=torch.Generator().manual_seed(4)).to(dtype)
    alpha_s, alpha_t = torch.tensor([0.8, 1.0]), torch.tensor([0.1, 0.5])
    draws = []
    for value in (-3.0, 3e4, torch.inf):
        logits[..., m] = value
        before = logits.clone()
        seed = torch.Generator().manual_seed(5)
        draws.append(sample_posterior(logits, z_t, alpha_s, alpha_t, kernel, generator=seed))
        assert torch.equal(logits, before) and logits.dtype == dtype  # read, not written
    assert torch.equal(draws[0], draws[1]) and torch.equal(draws[0], draws[2])
    assert not (draws[0][1] == m).any()


def test_mask_row_is_an_ordinary_one_at_k_1():
    """UDLM has no absorbing token: a mask logit counts like any other."""
    logits = torch.zeros(N)
    logits[2] = 20.0
    assert (draw(logits, 0, 1.0, 0.0, NoiseKernel(N, 1.0, 2)) == 2).float().mean() > 0.999


def test_bf16_logits_are_drawn_from_at_float32_precision():
    noise, kernel = Noise.mixing(N, 0.5, 0), NoiseKernel(N, 0.5, 0)
    logits = torch.linspace(-2, 2, N).bfloat16()
    law = bayes_posterior(clean_distribution(logits, noise), 0, 0.7, 0.2, noise.kernel())
    z_s = draw(logits, 0, 0.7, 0.2, kernel, n=20 * DRAWS)
    assert chi_square_p_value(counts(z_s), law) > FALSE_ALARM


def test_same_generator_state_same_draws_and_ids_untouched():
    z_t = torch.randint(0, N, (2, 100))
    logits, kernel, before = torch.randn(2, 100, N), NoiseKernel(N, 0.5, 0), z_t.clone()
    state = torch.random.get_rng_state()

    def step(seed):
        generator = torch.Generator().manual_seed(seed)
        return sample_posterior(logits, z_t, torch.tensor([0.9]), torch.tensor([0.2]), kernel, generator)

    assert torch.equal(step(1), step(1)) and not torch.equal(step(1), step(2))
    assert torch.equal(z_t, before) and torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("u", [0.0, 1 - 2.0**-53])
def test_extreme_uniform_numbers_never_choose_a_token_of_probability_zero(u, monkeypatch):
    """[0, 1) holds 0 and ends at 1 - 2^-53; [MASK] is row 0 and a suppressed token the last row."""

    def constant(shape, generator, device):
        return torch.full(shape, u, dtype=torch.float64, device=device)

    monkeypatch.setattr("xdlm_hf.diffusion.reverse.uniform", constant)
    logits = torch.randn(N, generator=torch.Generator().manual_seed(2))
    logits[-1] = -torch.inf
    z_s = draw(logits, 0, 1.0, 0.0, NoiseKernel(N, 0.5, 0), n=3)
    assert (z_s == (1 if u == 0 else N - 2)).all()


def test_row_blocks_change_nothing(monkeypatch):
    """The draw is the same when the vocabulary is read a few rows at a time."""
    args = torch.randn(2, 50, N), torch.randint(0, N, (2, 50)), torch.tensor([0.9]), torch.tensor([0.2])
    kernel = NoiseKernel(N, 0.5, 0)
    whole = sample_posterior(*args, kernel, torch.Generator().manual_seed(1))
    monkeypatch.setitem(_BLOCK_ELEMENTS, "cpu", 3 * N)
    assert torch.equal(sample_posterior(*args, kernel, torch.Generator().manual_seed(1)), whole)


def test_positions_are_drawn_independently():
    """Pairs of neighbours, all from [MASK], against the product of the dense law."""
    noise = Noise.mixing(N, 0.5, 0)
    logits = torch.linspace(-1, 1, N)
    law = bayes_posterior(clean_distribution(logits, noise), 0, 0.6, 0.1, noise.kernel())
    z_s = draw(logits, 0, 0.6, 0.1, NoiseKernel(N, 0.5, 0), n=10 * DRAWS)[0]
    pairs = counts(N * z_s[0::2] + z_s[1::2], N * N)
    assert chi_square_p_value(pairs, torch.outer(law, law)) > FALSE_ALARM


def test_chain_of_steps_with_the_true_p_ends_in_the_data_law():
    """One position, p = the data law: a whole ancestral run from the prior reproduces it, for any number of steps."""
    k, m, n = 0.3, 0, 4 * DRAWS
    noise, kernel = Noise.mixing(N, k, m), NoiseKernel(N, k, m)
    logits = torch.linspace(-2, 2, N)
    data_law = clean_distribution(logits, noise)
    for name in ("linear", "cosine"):
        alpha, _ = get_schedule(name)(torch.linspace(1, 0, 7, dtype=torch.float64))
        generator = torch.Generator().manual_seed(6)
        z = kernel.sample_prior((1, n), generator=generator)
        for alpha_t, alpha_s in zip(alpha[:-1], alpha[1:], strict=True):
            z = sample_posterior(logits.expand(1, n, N), z, alpha_s, alpha_t, kernel, generator)
            law = marginal(data_law, float(alpha_s), noise.kernel())
            assert chi_square_p_value(counts(z), law) > FALSE_ALARM


# --- refusals -------------------------------------------------------------------------------------------------


def call_posterior(values, z_t, alpha_s, alpha_t, kernel):
    return posterior(values.softmax(-1), z_t, alpha_s, alpha_t, kernel)


@pytest.mark.parametrize("function", [call_posterior, sample_posterior])
class TestRefusals:
    kernel = NoiseKernel(N, 0.5, 0)
    logits, z_t = torch.zeros(2, 3, N), torch.ones(2, 3, dtype=torch.long)
    high, low = torch.tensor([0.9, 0.8]), torch.tensor([0.5, 0.4])

    def test_time_running_backwards(self, function):
        with pytest.raises(ValueError, match=r"alpha_s=0.4 < alpha_t=0.8.*\(s < t\)"):
            function(self.logits, self.z_t, torch.tensor([0.9, 0.4]), self.high, self.kernel)

    @pytest.mark.parametrize("bad", [-1, N])
    def test_ids_outside_the_vocabulary(self, function, bad):
        z_t = self.z_t.clone()
        z_t[1, 2] = bad
        with pytest.raises(ValueError, match=rf"z_t holds token id {bad}, outside \[0, {N}\)"):
            function(self.logits, z_t, self.high, self.low, self.kernel)

    @pytest.mark.parametrize("bad", [-0.5, 1.5, float("nan")])
    def test_rates_outside_the_unit_interval(self, function, bad):
        with pytest.raises(ValueError, match=rf"alpha_s holds {bad:g}; a signal rate lies in \[0, 1\]"):
            function(self.logits, self.z_t, torch.tensor([0.9, bad]), self.low, self.kernel)

    def test_shapes_that_disagree(self, function):
        with pytest.raises(ValueError, match=r"\(B, L, 7\).*got \(2, 3\) and \(2, 3, 6\)"):
            function(self.logits[..., 1:], self.z_t, self.high, self.low, self.kernel)
        with pytest.raises(ValueError, match=r"got \(2, 2\) and \(2, 3, 7\)"):
            function(self.logits, self.z_t[:, 1:], self.high, self.low, self.kernel)
        with pytest.raises(ValueError, match="does not fit ids of shape"):
            function(self.logits, self.z_t, torch.full((3,), 0.9), self.low, self.kernel)


def test_int32_ids_stay_int32():
    kernel, half = NoiseKernel(5, 0.3, 0), torch.tensor([0.5])
    z_t = torch.tensor([[0, 1, 2]], dtype=torch.int32)
    assert sample_posterior(torch.randn(1, 3, 5), z_t, half + 0.2, half, kernel).dtype == torch.int32
    assert posterior(torch.full((1, 3, 5), 0.2), z_t, half + 0.2, half, kernel).shape == (1, 3, 5)


def test_nan_logits_are_refused():
    logits = torch.full((1, 4, 5), torch.nan)
    ones = torch.ones(1)
    with pytest.raises(ValueError, match="some logits are NaN"):
        sample_posterior(logits, torch.zeros(1, 4, dtype=torch.long), ones, 0 * ones, NoiseKernel(5, 0.0, 0))
