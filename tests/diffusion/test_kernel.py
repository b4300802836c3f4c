"""The stationary kernel: noise rate, corruption and prior against the dense matrices.

Each frequency test has the false-alarm probability FALSE_ALARM: that is how often the right law would fail it if the
seed were drawn anew. Seeds are fixed, so a pass stays a pass.
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
    binomial_bound,
    chi_square_p_value,
    marginal,
    one_hot,
    transition,
)
from xdlm_hf.diffusion.noise import NoiseKernel
from xdlm_hf.diffusion.schedules import get_schedule

FALSE_ALARM = 1e-6
DRAWS = 40_000
GRID = [(k, m) for k in MIXING_RATIOS for m in MASK_IDS]


def counts(ids, vocab_size=VOCABULARY):
    return ids.reshape(-1).bincount(minlength=vocab_size)


@pytest.mark.parametrize("k, m", GRID)
def test_rate_is_a_row_of_K(k, m):
    r = NoiseKernel(VOCABULARY, k, m).rate(torch.arange(VOCABULARY), dtype=torch.float64)
    K = Noise.mixing(VOCABULARY, k, m).kernel()
    torch.testing.assert_close(r.expand(VOCABULARY, -1), K, rtol=1e-15, atol=0)
    assert abs(r.sum() - 1) < 1e-15


@given(
    vocab_size=st.integers(1, 16),
    weights=st.lists(st.floats(0, 1), min_size=0, max_size=4),
    uniform=st.floats(0, 1),
    shift=st.integers(0, 15),
    alphas=st.tuples(st.floats(0.01, 1), st.floats(0.01, 1)),
)
def test_general_kernel_mixes_at_once_and_composes(vocab_size, weights, uniform, shift, alphas):
    """Lemma 3.1 with any special tokens: K from `rate` has rows of sum 1, K K = K and Q_s Q_t|s = Q_t."""
    total = sum(weights) + uniform
    ids = [(shift + i) % vocab_size for i in range(min(len(weights), vocab_size))]
    special = {i: w / total * 0.999 for i, w in zip(ids, weights, strict=False)} if total > 0 else {}
    kernel = NoiseKernel.from_special_weights(vocab_size, special)
    K = kernel.rate(torch.arange(vocab_size), dtype=torch.float64).expand(vocab_size, -1)
    assert (K.sum(1) - 1).abs().max() < 1e-14 and (K >= 0).all()
    assert (K @ K - K).abs().max() < 1e-14
    assert (K - Noise.several(vocab_size, special).kernel()).abs().max() < 1e-15
    a_t, a_s = sorted(alphas)
    Q_s, Q_ts, Q_t = (transition(a, K) for a in (a_s, a_t / a_s, a_t))
    assert (Q_s @ Q_ts - Q_t).abs().max() < 1e-14


def test_common_case_is_the_general_one():
    common, general = NoiseKernel(9, 0.25, 4), NoiseKernel.from_special_weights(9, {4: 0.75})
    assert common.special_weights == general.special_weights == {4: 0.75}
    assert common.mixing_ratio == general.mixing_ratio == 0.25
    assert common.absorbing_ids == general.absorbing_ids == (4,)
    assert common.mask_token_id == general.mask_token_id == 4
    several = NoiseKernel.from_special_weights(9, {4: 0.5, 0: 0.25, 7: 0.0})
    assert set(several.absorbing_ids) == {0, 4}  # a token of weight 0 is an ordinary token
    assert NoiseKernel(9, 1.0, 4).absorbing_ids == () == NoiseKernel(9, 1.0).absorbing_ids


@pytest.mark.parametrize("name", ["linear", "cosine"])
@pytest.mark.parametrize("k, m", GRID)
def test_corruption_frequencies(k, m, name):
    """Every clean token at four times: DRAWS draws each against the row of Q_t; 4 x 7 tests per case."""
    generator = torch.Generator().manual_seed(5)
    kernel, K = NoiseKernel(VOCABULARY, k, m), Noise.mixing(VOCABULARY, k, m).kernel()
    alpha, _ = get_schedule(name)(torch.tensor([0.02, 0.4, 0.8, 0.99], dtype=torch.float64))
    for x_0 in range(VOCABULARY):
        ids = torch.full((4, DRAWS), x_0)
        z_t = kernel.corrupt(ids, alpha, generator=generator)
        assert z_t.shape == ids.shape and z_t.dtype == torch.int64 and (ids == x_0).all()
        for b in range(4):
            law = marginal(one_hot(x_0, VOCABULARY), float(alpha[b]), K)
            assert chi_square_p_value(counts(z_t[b]), law) > FALSE_ALARM, (x_0, b)


@pytest.mark.parametrize("k, m", GRID)
def test_prior_frequencies(k, m):
    generator = torch.Generator().manual_seed(6)
    z_1 = NoiseKernel(VOCABULARY, k, m).sample_prior((200, DRAWS // 100), generator=generator)
    assert z_1.shape == (200, DRAWS // 100) and z_1.dtype == torch.int64
    assert chi_square_p_value(counts(z_1), Noise.mixing(VOCABULARY, k, m).kernel()[0]) > FALSE_ALARM


def test_frequencies_with_several_special_tokens():
    """Lemma 3.1 in full: two absorbing tokens, one with the larger id first, and a uniform rest of 0.2."""
    special = {5: 0.3, 1: 0.5}
    kernel, noise = NoiseKernel.from_special_weights(VOCABULARY, special), Noise.several(VOCABULARY, special)
    generator = torch.Generator().manual_seed(7)
    prior = kernel.sample_prior((1, 10 * DRAWS), generator=generator)
    assert chi_square_p_value(counts(prior), noise.kernel()[0]) > FALSE_ALARM
    z_t = kernel.corrupt(torch.full((1, 10 * DRAWS), 2), torch.tensor([0.4]), generator=generator)
    assert chi_square_p_value(counts(z_t), marginal(one_hot(2, VOCABULARY), 0.4, noise.kernel())) > FALSE_ALARM


def test_rare_uniform_noise_is_drawn_at_its_rate():
    """k = 1e-3, alpha = 0.9: a token changes to another, not [MASK], with probability 0.1 x 1e-3 x 5/7."""
    n = 4_000_000
    z_t = NoiseKernel(VOCABULARY, 1e-3, 0).corrupt(
        torch.full((1, n), 3), torch.tensor([0.9]), generator=torch.Generator().manual_seed(8)
    )
    changed = int(((z_t != 3) & (z_t != 0)).sum())
    assert binomial_bound(changed, n, 0.1 * 1e-3 * 5 / 7) > FALSE_ALARM


def test_positions_are_independent():
    """Neighbours in a row and rows of a batch: joint frequencies of the pair against the product law."""
    n, alpha = 200_000, torch.tensor([0.5, 0.5])
    z_t = NoiseKernel(4, 0.5, 0).corrupt(torch.full((2, n), 2), alpha, generator=torch.Generator().manual_seed(9))
    law = marginal(one_hot(2, 4), 0.5, Noise.mixing(4, 0.5, 0).kernel())
    joint = torch.outer(law, law).reshape(-1)
    assert chi_square_p_value(counts(4 * z_t[0, 0::2] + z_t[0, 1::2], 16), joint) > FALSE_ALARM
    assert chi_square_p_value(counts(4 * z_t[0] + z_t[1], 16), joint) > FALSE_ALARM


@pytest.mark.parametrize("k, m", GRID)
def test_full_signal_keeps_everything_and_none_is_the_prior(k, m):
    kernel, generator = NoiseKernel(VOCABULARY, k, m), torch.Generator().manual_seed(10)
    x_0 = torch.randint(0, VOCABULARY, (2, 5000), generator=generator)
    z_t = kernel.corrupt(x_0, torch.tensor([1.0, 0.0]), generator=generator)
    assert torch.equal(z_t[0], x_0[0])
    assert chi_square_p_value(counts(z_t[1]), Noise.mixing(VOCABULARY, k, m).kernel()[0]) > FALSE_ALARM
    if k == 0:
        assert (z_t[1] == m).all()


def test_uniform_noise_reaches_the_mask_row_and_the_last_row():
    """N counts [MASK] and padding rows, so r(m) = k/N + mu: at k = 1 [MASK] is drawn like any other token."""
    z_1 = NoiseKernel(VOCABULARY, 1.0, 0).sample_prior((1, DRAWS), generator=torch.Generator().manual_seed(11))
    assert set(z_1.unique().tolist()) == set(range(VOCABULARY))


def test_same_generator_state_same_noise():
    kernel, x_0, alpha = NoiseKernel(VOCABULARY, 0.5, 0), torch.full((2, 300), 3), torch.tensor([0.5, 0.1])

    def draw(seed):
        generator = torch.Generator().manual_seed(seed)
        first = kernel.corrupt(x_0, alpha, generator=generator)
        return first, kernel.corrupt(x_0, alpha, generator=generator), kernel.sample_prior((2, 300), generator)

    first, second, prior = draw(1)
    assert not torch.equal(first, second)  # the generator moves on
    assert all(torch.equal(a, b) for a, b in zip(draw(1), (first, second, prior), strict=True))
    assert not torch.equal(draw(2)[0], first)
    state = torch.random.get_rng_state()
    draw(3)
    assert torch.equal(torch.random.get_rng_state(), state)  # the global generator is left alone


@pytest.mark.parametrize("alpha", [torch.tensor([0.3, 0.9]), torch.tensor([[0.3], [0.9]])])
def test_one_rate_per_row(alpha):
    kernel, x_0 = NoiseKernel(VOCABULARY, 0.5, 0), torch.full((2, DRAWS), 3)
    z_t = kernel.corrupt(x_0, alpha, generator=torch.Generator().manual_seed(12))
    for row, rate in zip(z_t, (0.3, 0.9), strict=True):
        law = marginal(one_hot(3, VOCABULARY), rate, Noise.mixing(VOCABULARY, 0.5, 0).kernel())
        assert chi_square_p_value(counts(row), law) > FALSE_ALARM


def test_scalar_rate_serves_every_row():
    kernel, x_0 = NoiseKernel(VOCABULARY, 0.5, 0), torch.full((2, 50), 3)
    draws = [
        kernel.corrupt(x_0, a, generator=torch.Generator().manual_seed(13))
        for a in (torch.tensor(0.3), torch.tensor([0.3, 0.3]))
    ]
    assert torch.equal(*draws)


@pytest.mark.parametrize("k", [-0.1, 1.5, float("nan")])
def test_mixing_ratio_outside_the_unit_interval_is_refused(k):
    with pytest.raises(ValueError, match=rf"mixing_ratio={k} must lie in \[0, 1\]"):
        NoiseKernel(VOCABULARY, k, 0)


def test_masking_without_a_mask_token_is_refused():
    with pytest.raises(ValueError, match="mixing_ratio=0.9 .*pass mask_token_id"):
        NoiseKernel(VOCABULARY, 0.9)
    assert NoiseKernel(VOCABULARY, 1).mask_token_id is None


@pytest.mark.parametrize("m", [-1, VOCABULARY])
def test_mask_id_outside_the_vocabulary_is_refused(m):
    with pytest.raises(ValueError, match=rf"id {m} is not in \[0, {VOCABULARY}\)"):
        NoiseKernel(VOCABULARY, 0.5, m)


@pytest.mark.parametrize("special", [{0: -0.1}, {0: 0.7, 1: 0.4}, {0: float("nan")}])
def test_special_weights_that_are_no_weights_are_refused(special):
    with pytest.raises(ValueError, match="must be non-negative and sum to at most 1"):
        NoiseKernel.from_special_weights(VOCABULARY, special)


def test_empty_vocabulary_is_refused():
    with pytest.raises(ValueError, match="vocab_size=0 must be a positive"):
        NoiseKernel(0, 1.0)


@pytest.mark.parametrize("bad", [-1, VOCABULARY])
def test_ids_outside_the_vocabulary_are_refused(bad):
    kernel = NoiseKernel(VOCABULARY, 0.5, 0)
    ids = torch.tensor([[1, bad]])
    with pytest.raises(ValueError, match=rf"x_0 holds token id {bad}, outside \[0, {VOCABULARY}\)"):
        kernel.corrupt(ids, torch.tensor([0.5]))
    with pytest.raises(ValueError, match=f"holds token id {bad}"):
        kernel.rate(ids)


@pytest.mark.parametrize("alpha", [-0.01, 1.01, float("nan")])
def test_rate_outside_the_unit_interval_is_refused(alpha):
    with pytest.raises(ValueError, match=rf"alpha_t holds {alpha:g}; a signal rate lies in \[0, 1\]"):
        NoiseKernel(VOCABULARY, 0.5, 0).corrupt(torch.tensor([[1, 2]]), torch.tensor([alpha]))


@pytest.mark.parametrize("shape", [(3,), (2, 2), (2, 1, 1)])
def test_rate_of_another_shape_is_refused(shape):
    with pytest.raises(ValueError, match=r"does not fit ids of shape \(2, 4\).*\(2,\) or \(2, 1\)"):
        NoiseKernel(VOCABULARY, 0.5, 0).corrupt(torch.ones(2, 4, dtype=torch.long), torch.full(shape, 0.5))


def test_ids_without_a_batch_are_refused():
    with pytest.raises(ValueError, match=r"token ids must be \(B, L\), got \(3,\)"):
        NoiseKernel(7, 0.1, 0).corrupt(torch.tensor([1, 2, 3]), torch.rand(1))


@pytest.mark.parametrize(
    "args, message", [((7.5, 1.0), "vocab_size=7.5 must be a positive integer"), ((7, 0.1, 3.0), "3.0")]
)
def test_sizes_and_ids_are_integers(args, message):
    with pytest.raises(ValueError, match=message):
        NoiseKernel(*args)
