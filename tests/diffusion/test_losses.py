"""Finite-step divergence, continuous objective and fused twin against the dense oracle (Eqs. 4, 12-15, 17, 19).

Two yardsticks: float64 matrices where they are exact enough (relative error 1e-10), mpmath where float64 itself cancels
(alpha near 0 or 1, p near one-hot).
"""

import math

import mpmath
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from reference import (
    MASK_IDS,
    MIXING_RATIOS,
    VOCABULARY,
    Noise,
    batch_kl,
    batch_objective,
    clean_distribution,
    draw_case,
    draw_forward,
    exact_kl,
    exact_objective,
    exact_softmax,
    udlm_rate,
)
from xdlm_hf.diffusion.losses import diffusion_loss, kl_divergence
from xdlm_hf.diffusion.noise import NoiseKernel
from xdlm_hf.diffusion.ops.fused import fused_linear_diffusion_loss
from xdlm_hf.diffusion.schedules import get_schedule

N = VOCABULARY
GRID = [(k, m) for k in MIXING_RATIOS for m in MASK_IDS]
NAMES = ("linear", "cosine")
F64 = torch.float64


def kernel_of(case):
    return NoiseKernel(N, case.k, case.m)


def rates(case, name):
    """(alpha_s, alpha_t, alpha'_t) of a case, each (B,) float64."""
    schedule = get_schedule(name)
    return schedule(case.s)[0], *schedule(case.t)


def one_token(logits, x_0, z_t, k, m, alpha_t, alpha_s=None):
    """Loss of a single token and its gradient: (float, (N,)). Finite step if alpha_s is given."""
    logits = logits.clone().reshape(1, 1, -1).requires_grad_()
    ids = torch.tensor([[x_0]]), torch.tensor([[z_t]])
    kernel = NoiseKernel(logits.shape[-1], k, m)
    a_t = torch.tensor([alpha_t], dtype=F64)
    if alpha_s is None:
        loss = diffusion_loss(logits, *ids, a_t, -torch.ones(1, dtype=F64), kernel)
    else:
        loss = kl_divergence(logits, *ids, torch.tensor([alpha_s], dtype=F64), a_t, kernel)
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    return loss.item(), gradient.reshape(-1)


def exact_token(logits, x_0, z_t, k, m, alpha_t, alpha_s=None):
    """The same number with mpmath."""
    noise = Noise.mixing(logits.numel(), k, m)
    p = exact_softmax(logits.double().tolist(), noise)
    if alpha_s is None:
        return float(exact_objective(x_0, p, z_t, alpha_t, -1, noise))
    return float(exact_kl(x_0, p, z_t, alpha_s, alpha_t, noise))


def exact_gradient(logits, x_0, z_t, k, m, alpha_t, alpha_s=None, step=1e-30):
    """Central difference of the mpmath value in each logit, with a step of 1e-30: exact to float64."""
    noise = Noise.mixing(logits.numel(), k, m)
    with mpmath.workdps(220):
        h, out = mpmath.mpf(step), []
        for e in range(logits.numel()):
            values = []
            for sign in (1, -1):
                shifted = [mpmath.mpf(v) for v in logits.double().tolist()]
                shifted[e] += sign * h
                p = exact_softmax(shifted, noise)
                if alpha_s is None:
                    values.append(exact_objective(x_0, p, z_t, alpha_t, -1, noise))
                else:
                    values.append(exact_kl(x_0, p, z_t, alpha_s, alpha_t, noise))
            out.append(float((values[0] - values[1]) / (2 * h)))
    return torch.tensor(out, dtype=F64)


# --- values ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("k, m", GRID)
def test_finite_step_equals_the_dense_divergence(k, m, name):
    case = draw_case(k, m)
    alpha_s, alpha_t, _ = rates(case, name)
    kl = kl_divergence(case.logits, case.x_0, case.z_t, alpha_s, alpha_t, kernel_of(case))
    expected = batch_kl(case.logits, case.x_0, case.z_t, alpha_s, alpha_t, case.noise)
    torch.testing.assert_close(kl, expected, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("k, m", GRID)
def test_objective_equals_equations_14_and_15(k, m, name):
    case = draw_case(k, m)
    _, alpha_t, d_alpha_t = rates(case, name)
    loss = diffusion_loss(case.logits, case.x_0, case.z_t, alpha_t, d_alpha_t, kernel_of(case))
    expected = batch_objective(case.logits, case.x_0, case.z_t, alpha_t, d_alpha_t, case.noise)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("k, m", GRID)
def test_both_equal_mpmath_for_sharp_predictions(k, m):
    """Logits six times as large: p from 1e-15 to nearly 1, where matrices in float64 lose digits."""
    case = draw_case(k, m, seed=1, scale=6.0, length=2)
    alpha_s, alpha_t = 1 - case.s, 1 - case.t
    kl = kl_divergence(case.logits, case.x_0, case.z_t, alpha_s, alpha_t, kernel_of(case))
    loss = diffusion_loss(case.logits, case.x_0, case.z_t, alpha_t, -torch.ones(4, dtype=F64), kernel_of(case))
    for b in range(4):
        for i in range(2):
            token = (case.logits[b, i], int(case.x_0[b, i]), int(case.z_t[b, i]), k, m, float(alpha_t[b]))
            weight = 1 / (1 - float(alpha_t[b]))  # c = r / f_t(x, z) is at most 1 / beta_t
            assert kl[b, i].item() == pytest.approx(exact_token(*token, float(alpha_s[b])), rel=1e-11, abs=1e-14)
            assert loss[b, i].item() == pytest.approx(exact_token(*token), rel=1e-11, abs=1e-14 * weight)


def test_several_special_tokens():
    """Lemma 3.1 in full: the sum over the vocabulary leaves every absorbing token out."""
    special = {4: 0.5, 1: 0.25}
    noise, kernel = Noise.several(N, special), NoiseKernel.from_special_weights(N, special)
    generator = torch.Generator().manual_seed(2)
    x_0 = torch.tensor([[0, 2, 3, 5, 6]]).repeat(8, 1)
    alpha_s, alpha_t = torch.full((8,), 0.7, dtype=F64), torch.full((8,), 0.4, dtype=F64)
    z_t = draw_forward(x_0, alpha_t, noise, generator)
    logits = torch.randn(8, 5, N, dtype=F64, generator=generator)
    assert {1, 4} <= set(z_t.unique().tolist())
    kl = kl_divergence(logits, x_0, z_t, alpha_s, alpha_t, kernel)
    torch.testing.assert_close(kl, batch_kl(logits, x_0, z_t, alpha_s, alpha_t, noise), rtol=1e-10, atol=1e-14)
    loss = diffusion_loss(logits, x_0, z_t, alpha_t, -torch.ones(8, dtype=F64), kernel)
    p = clean_distribution(logits, noise)
    for b in range(3):
        for i in range(5):
            token = int(x_0[b, i]), p[b, i].tolist(), int(z_t[b, i])
            expected = float(exact_objective(*token, 0.4, -1, noise))
            assert loss[b, i].item() == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("z_t", [2, 4])
@pytest.mark.parametrize("k", [1e-3, 0.1, 0.9])
def test_a_mask_in_the_clean_text_has_the_loss_that_theory_gives(k, z_t):
    """x_0 = [MASK] has p_0 = 0, yet f_t(p, m) > 0: the divergence is finite and equals the dense one."""
    logits = torch.linspace(-1, 1, N, dtype=F64)
    loss, gradient = one_token(logits, 2, z_t, k, 2, 0.4)
    assert loss == pytest.approx(exact_token(logits, 2, z_t, k, 2, 0.4), rel=1e-10)
    torch.testing.assert_close(gradient, exact_gradient(logits, 2, z_t, k, 2, 0.4), rtol=1e-9, atol=1e-13)
    kl, gradient = one_token(logits, 2, z_t, k, 2, 0.4, 0.7)
    assert kl == pytest.approx(exact_token(logits, 2, z_t, k, 2, 0.4, 0.7), rel=1e-10)
    torch.testing.assert_close(gradient, exact_gradient(logits, 2, z_t, k, 2, 0.4, 0.7), rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("m", MASK_IDS)
def test_k_0_is_mdlm(m, name):
    """Eq. 17 on masked tokens, in the step and (weight -alpha'_t / beta_t) in the limit; exactly 0 elsewhere."""
    case = draw_case(0.0, m)
    alpha_s, alpha_t, d_alpha_t = rates(case, name)
    log_p = clean_distribution(case.logits, case.noise).gather(-1, case.x_0[..., None]).squeeze(-1).log()
    masked = case.z_t == m
    step = ((alpha_s - alpha_t) / (1 - alpha_t))[:, None] * -log_p * masked
    limit = (-d_alpha_t / (1 - alpha_t))[:, None] * -log_p * masked
    assert masked.any() and not masked.all()
    kl = kl_divergence(case.logits, case.x_0, case.z_t, alpha_s, alpha_t, kernel_of(case))
    loss = diffusion_loss(case.logits, case.x_0, case.z_t, alpha_t, d_alpha_t, kernel_of(case))
    torch.testing.assert_close(kl, step, rtol=1e-12, atol=0)
    torch.testing.assert_close(loss, limit, rtol=1e-12, atol=0)


@pytest.mark.parametrize("m", [None, 3])
def test_k_1_is_udlm_with_or_without_a_mask_token(m):
    """Eq. 19 with its signs corrected."""
    case = draw_case(1.0, 3)
    alpha_t = 1 - case.t
    loss = diffusion_loss(case.logits, case.x_0, case.z_t, alpha_t, -torch.ones(4, dtype=F64), NoiseKernel(N, 1.0, m))
    p = case.logits.softmax(-1)
    for b in range(4):
        for i in range(5):
            token = int(case.x_0[b, i]), p[b, i], int(case.z_t[b, i]), float(alpha_t[b])
            torch.testing.assert_close(loss[b, i], udlm_rate(*token, "corrected"), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("shape", [(4,), (4, 1), ()])
def test_rates_may_be_columns_or_scalars(shape):
    case = draw_case(0.5, 3)
    alpha_s, alpha_t, slope = (torch.full(shape, v, dtype=F64) for v in (0.75, 0.25, -2.0))
    kl = kl_divergence(case.logits, case.x_0, case.z_t, alpha_s, alpha_t, kernel_of(case))
    loss = diffusion_loss(case.logits, case.x_0, case.z_t, alpha_t, slope, kernel_of(case))
    full = [torch.full((4,), v, dtype=F64) for v in (0.75, 0.25, -2.0)]
    torch.testing.assert_close(kl, batch_kl(case.logits, case.x_0, case.z_t, *full[:2], case.noise))
    torch.testing.assert_close(loss, batch_objective(case.logits, case.x_0, case.z_t, *full[1:], case.noise))


# --- properties -----------------------------------------------------------------------------------------------


@given(
    k=st.one_of(st.just(0.0), st.floats(1e-9, 1)),
    alphas=st.tuples(*2 * [st.one_of(st.just(0.0), st.floats(1e-12, 1))]),
    scale=st.floats(0, 30),
    ids=st.tuples(st.integers(1, N - 1), st.integers(0, N - 1)),
    seed=st.integers(0, 1000),
)
def test_divergences_are_finite_and_not_negative(k, alphas, scale, ids, seed):
    """Any k, any times, sharp or flat predictions; float32 may fall below zero by rounding of its weight alone."""
    alpha_t, alpha_s = sorted(alphas)
    x_0, z_t = ids
    if alpha_t > 1 - 1e-6 or (k == 0 and z_t not in (0, x_0)):
        return  # t = 0 has its own tests, and at k = 0 another token cannot occur
    logits = scale * torch.randn(N, dtype=F64, generator=torch.Generator().manual_seed(seed))
    weight = 1 / (1 - alpha_t)
    for dtype, tolerance in ((F64, 1e-13), (torch.float32, 2e-6)):
        loss, gradient = one_token(logits.to(dtype), x_0, z_t, k, 0, alpha_t)
        kl, kl_gradient = one_token(logits.to(dtype), x_0, z_t, k, 0, alpha_t, alpha_s)
        assert -tolerance * weight <= loss < math.inf
        assert -tolerance * weight <= kl < math.inf
        assert torch.isfinite(gradient).all() and torch.isfinite(kl_gradient).all()
        # softmax does not see a common shift of the logits; where p is sure of a wrong z the terms are 1/alpha times
        # their sum
        assert abs(gradient.sum()) <= 100 * tolerance * (weight + gradient.abs().max())


@pytest.mark.parametrize("k, m", GRID)
def test_zero_at_the_perfect_prediction(k, m):
    """p = one-hot at x_0 (to 1e-26) makes both posteriors equal; a worse p costs more than rounding."""
    case = draw_case(k, m)
    right = torch.full_like(case.logits, -60.0).scatter_(-1, case.x_0[..., None], 0.0)
    alpha_s, alpha_t, d_alpha_t = rates(case, "cosine")
    for logits, is_zero in ((right, True), (right.roll(1, dims=-1), False)):
        kl = kl_divergence(logits, case.x_0, case.z_t, alpha_s, alpha_t, kernel_of(case))
        loss = diffusion_loss(logits, case.x_0, case.z_t, alpha_t, d_alpha_t, kernel_of(case))
        assert (kl.abs().max() < 1e-14) == (loss.abs().max() < 1e-12) == is_zero


@pytest.mark.parametrize("k", MIXING_RATIOS)
def test_step_tends_to_the_limit_at_first_order(k):
    """-alpha'_t KL / (alpha_s - alpha_t) - loss falls like the step: log-log slope 1, over four decades."""
    case = draw_case(k, 3, seed=2)
    alpha_t = torch.tensor([0.9, 0.6, 0.3, 0.1], dtype=F64)
    z_t = draw_forward(case.x_0, alpha_t, case.noise, torch.Generator().manual_seed(3))
    loss = diffusion_loss(case.logits, case.x_0, z_t, alpha_t, -torch.ones(4, dtype=F64), kernel_of(case))
    errors, steps = [], 10.0 ** torch.arange(-6, -1.9, 0.5, dtype=F64)
    for h in steps:
        kl = kl_divergence(case.logits, case.x_0, z_t, alpha_t + h, alpha_t, kernel_of(case))
        # the step that the rounded rates make
        errors.append((kl / (alpha_t + h - alpha_t)[:, None] - loss).abs().sum())
    errors = torch.stack(errors)
    if k == 0:  # KL is proportional to the step: no error at all
        assert errors.max() < 1e-8
        return
    x, y = steps.log(), errors.log()
    slope = ((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()
    assert 0.9 < slope < 1.1
    assert errors[-1] > 1e-3  # a real error, not rounding, was fitted


# --- gradients ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k, m", GRID)
def test_gradients_equal_autograd_through_the_oracle(k, m):
    case = draw_case(k, m)
    alpha_s, alpha_t, d_alpha_t = rates(case, "cosine")
    upstream = torch.randn(4, 5, dtype=F64, generator=torch.Generator().manual_seed(4))

    def gradient(function, *args):
        logits = case.logits.clone().requires_grad_()
        (out,) = torch.autograd.grad(function(logits, case.x_0, case.z_t, *args), logits, upstream)
        return out

    ours = gradient(kl_divergence, alpha_s, alpha_t, kernel_of(case))
    torch.testing.assert_close(ours, gradient(batch_kl, alpha_s, alpha_t, case.noise), rtol=1e-9, atol=1e-13)
    ours = gradient(diffusion_loss, alpha_t, d_alpha_t, kernel_of(case))
    dense = gradient(batch_objective, alpha_t, d_alpha_t, case.noise)
    torch.testing.assert_close(ours, dense, rtol=1e-9, atol=1e-11)
    if k < 1:
        assert (ours[..., m] == 0).all()


@pytest.mark.parametrize("k", MIXING_RATIOS)
def test_gradcheck(k):
    case = draw_case(k, 0, length=2)
    alpha_s, alpha_t, d_alpha_t = rates(case, "cosine")
    logits = case.logits.clone().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: kl_divergence(x, case.x_0, case.z_t, alpha_s, alpha_t, kernel_of(case)), logits
    )
    assert torch.autograd.gradcheck(
        lambda x: diffusion_loss(x, case.x_0, case.z_t, alpha_t, d_alpha_t, kernel_of(case)), logits
    )


@pytest.mark.parametrize("k", MIXING_RATIOS)
def test_gradcheck_of_the_fused_loss(k):
    """hidden and weight together, chunks that do not divide the six tokens, unequal token weights."""
    case = draw_case(k, 0, length=2)
    generator = torch.Generator().manual_seed(5)
    hidden = torch.randn(4, 2, 3, dtype=F64, generator=generator, requires_grad=True)
    weight = torch.randn(N, 3, dtype=F64, generator=generator, requires_grad=True)
    token_weights = torch.rand(4, 2, dtype=F64, generator=generator)
    _, alpha_t, d_alpha_t = rates(case, "cosine")

    def total(hidden, weight):
        return fused_linear_diffusion_loss(
            hidden,
            weight,
            case.x_0,
            case.z_t,
            alpha_t,
            d_alpha_t,
            kernel_of(case),
            token_weights=token_weights,
            chunk_size=3,
        )[0]

    assert torch.autograd.gradcheck(total, (hidden, weight))


@pytest.mark.parametrize("k", [0.0, 0.1, 0.9])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, F64])
def test_mask_row_has_no_part(k, dtype):
    """For k < 1 its logit changes nothing and its gradient is exactly zero, however large the logit."""
    case, m = draw_case(k, 3), 3
    alpha_s, alpha_t, d_alpha_t = rates(case, "linear")
    results = []
    for value in (-2.0, 3e4, torch.inf):
        logits = case.logits.to(dtype, copy=True)
        logits[..., m] = value
        logits.requires_grad_()
        loss = diffusion_loss(logits, case.x_0, case.z_t, alpha_t, d_alpha_t, kernel_of(case))
        kl = kl_divergence(logits, case.x_0, case.z_t, alpha_s, alpha_t, kernel_of(case))
        (gradient,) = torch.autograd.grad(loss.sum() + kl.sum(), logits)
        assert (gradient[..., m] == 0).all() and gradient.abs().sum() > 0
        results.append((loss, kl, gradient))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_mask_row_is_an_ordinary_one_at_k_1():
    case = draw_case(1.0, 3)
    logits = case.logits.clone().requires_grad_()
    _, alpha_t, d_alpha_t = rates(case, "linear")
    loss = diffusion_loss(logits, case.x_0, case.z_t, alpha_t, d_alpha_t, NoiseKernel(N, 1.0, 3))
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    assert (gradient[..., 3] != 0).all()


# --- precision ------------------------------------------------------------------------------------------------


def naive_objective(logits, x_0, z_t, alpha_t, k, m):
    """Eqs. 14 and 15 as printed, in the logits' dtype throughout: what plain PyTorch code would do."""
    dtype = logits.dtype
    r = torch.full((N,), k / N, dtype=dtype)
    if k < 1:
        r[m] += 1 - k
        logits = logits.index_fill(-1, torch.tensor([m]), -torch.inf)
    p, x = logits.softmax(-1), torch.nn.functional.one_hot(x_0, N).to(dtype)
    a = alpha_t.to(dtype)[:, None, None]
    f_x, f_p = a * x + (1 - a) * r, a * p + (1 - a) * r

    def at(values, ids):
        return values.expand(*ids.shape, N).gather(-1, ids[..., None]).squeeze(-1)

    log_ratio = (f_x / f_p).log()
    a = a.squeeze(-1)
    h = (at(x, z_t) - at(p, z_t)) / at(f_p, z_t) - at(log_ratio, z_t) / a + at(log_ratio, x_0)
    h = h + k * (1 - a) / (N * a) * log_ratio.nansum(-1)
    return at(r, z_t) / at(f_x, z_t) * h


@pytest.mark.parametrize("alpha", [1e-6, 1e-4, 1e-2, 0.3, 0.7, 0.99, 0.9999])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("k", [k for k in MIXING_RATIOS if k > 0])
def test_no_less_precise_than_the_plain_formula(k, dtype, alpha):
    """|ours - exact| <= |naive - exact| + 1e-6 (weight + exact), token by token; exact is mpmath on the same logits."""
    case = draw_case(k, 0, seed=6, length=3)
    alpha_t = torch.full((4,), alpha, dtype=F64)
    z_t = draw_forward(case.x_0, alpha_t, case.noise, torch.Generator().manual_seed(7))
    z_t[0], z_t[1] = (0, 3) if k < 1 else (1, 3)  # rare events too
    logits = case.logits.to(dtype)
    slope = -torch.ones(4, dtype=F64)
    ours = diffusion_loss(logits, case.x_0, z_t, alpha_t, slope, kernel_of(case))
    assert ours.dtype == torch.float32
    naive = naive_objective(logits, case.x_0, z_t, alpha_t, k, 0)
    for b in range(4):
        for i in range(3):
            exact = exact_token(logits[b, i], int(case.x_0[b, i]), int(z_t[b, i]), k, 0, alpha)
            weight = 1.0 if z_t[b, i] == case.x_0[b, i] else 1 / (1 - alpha)
            error, plain = abs(ours[b, i].item() - exact), abs(naive[b, i].item() - exact)
            if math.isnan(plain):
                plain = math.inf
            assert error <= min(plain, 1e-3 * weight) + 1e-6 * (min(alpha, 1.0) * weight + exact), (b, i, exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("k", MIXING_RATIOS)
def test_gradient_no_less_precise_than_the_plain_formula(k, dtype):
    case = draw_case(k, 0, seed=8)
    alpha_t = torch.tensor([0.999, 0.5, 1e-2, 1e-5], dtype=F64)
    z_t = draw_forward(case.x_0, alpha_t, case.noise, torch.Generator().manual_seed(9))
    slope = -torch.ones(4, dtype=F64)

    def gradient(function, logits, *args):
        logits = logits.clone().requires_grad_()
        return torch.autograd.grad(function(logits, case.x_0, z_t, *args).sum(), logits)[0].double()

    logits = case.logits.to(dtype)
    ours = gradient(diffusion_loss, logits, alpha_t, slope, kernel_of(case))
    exact = gradient(diffusion_loss, logits.double(), alpha_t, slope, kernel_of(case))
    naive = gradient(naive_objective, logits, alpha_t, k, 0)
    scale = exact.abs().amax(-1, keepdim=True)
    ulp = torch.finfo(dtype).eps
    plain = (naive - exact).abs().nan_to_num(nan=torch.inf)
    # the answer is rounded to the logits' dtype; before that the error is that of float32 sums which cancel to a tenth
    assert ((ours - exact).abs() <= plain.clamp_max(ulp * scale) + 5e-6 * scale + ulp * exact.abs()).all()


def test_full_vocabulary_in_float32():
    """126 464 rows as in LLaDA-8B: float32 against the float64 path, relative to the loss."""
    vocab_size, m = 126_464, 126_336
    generator = torch.Generator().manual_seed(10)
    logits = 3 * torch.randn(2, 2, vocab_size, generator=generator)
    x_0 = torch.tensor([[5, 17], [99, 126_463]])
    logits.scatter_add_(-1, x_0[..., None], torch.full((2, 2, 1), 12.0))
    z_t = torch.tensor([[m, 17], [1234, m]])
    alpha_t, slope = torch.tensor([0.4, 0.02], dtype=F64), -torch.ones(2, dtype=F64)
    for k in (0.0, 0.1, 1.0):
        kernel = NoiseKernel(vocab_size, k, m)
        if k == 0:
            z_t = z_t.clone()
            z_t[1, 0] = m
        single = diffusion_loss(logits, x_0, z_t, alpha_t, slope, kernel)
        double = diffusion_loss(logits.double(), x_0, z_t, alpha_t, slope, kernel)
        torch.testing.assert_close(single.double(), double, rtol=2e-6, atol=1e-7)


# --- edges ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha_t", [0.0, 1e-12, 1e-7, 1e-6, 1e-3])
@pytest.mark.parametrize("z_t", [0, 2, 5])
@pytest.mark.parametrize("k", [1e-3, 0.1, 0.5, 0.9, 1.0])
def test_alpha_near_0(k, z_t, alpha_t):
    """Nothing cancels: relative error 1e-9 in float64 and 1e-4 in float32 down to alpha = 1e-12."""
    logits = torch.linspace(-1, 1, N, dtype=F64)
    exact, slope = exact_token(logits, 2, z_t, k, 0, alpha_t), exact_gradient(logits, 2, z_t, k, 0, alpha_t)
    loss, gradient = one_token(logits, 2, z_t, k, 0, alpha_t)
    assert loss == pytest.approx(exact, rel=1e-9, abs=1e-30)
    torch.testing.assert_close(gradient, slope, rtol=1e-8, atol=1e-30 + 1e-9 * float(slope.abs().max()))
    loss, gradient = one_token(logits.float(), 2, z_t, k, 0, alpha_t)
    assert loss == pytest.approx(exact, rel=1e-4, abs=1e-30)
    torch.testing.assert_close(gradient.double(), slope, rtol=1e-4, atol=1e-30 + 1e-4 * float(slope.abs().max()))


@pytest.mark.parametrize("alpha_t", [0.999, 1 - 1e-6, 1 - 1e-9, 1.0])
@pytest.mark.parametrize("k", MIXING_RATIOS)
def test_alpha_near_1(k, alpha_t):
    """The token is still itself: f_t(x, z) -> 1. At k = 0 it has no loss; at t = 0 the value is r(z) (1 - p) / p."""
    logits = torch.linspace(-1, 1, N, dtype=F64)
    loss, gradient = one_token(logits, 2, 2, k, 0, alpha_t)
    exact = exact_token(logits, 2, 2, k, 0, alpha_t)
    assert loss == pytest.approx(exact, rel=1e-9, abs=1e-16)
    if alpha_t == 1:
        p = float(clean_distribution(logits, Noise.mixing(N, k, 0))[2])
        assert loss == pytest.approx(k / N * (1 - p) / p, rel=1e-12)
    slope = exact_gradient(logits, 2, 2, k, 0, alpha_t)
    torch.testing.assert_close(gradient, slope, rtol=1e-8, atol=1e-15)


@pytest.mark.parametrize("alpha_t", [1 - 1e-3, 1 - 1e-6])
@pytest.mark.parametrize("k", [1e-3, 0.1, 1.0])
def test_rare_noise_near_t_0(k, alpha_t):
    """[MASK] or another token just after t = 0: weight 1/beta_t, finite and exact."""
    logits = torch.linspace(-1, 1, N, dtype=F64)
    for z_t in (0, 5):
        loss, gradient = one_token(logits, 2, z_t, k, 0, alpha_t)
        assert loss == pytest.approx(exact_token(logits, 2, z_t, k, 0, alpha_t), rel=1e-9)
        slope = exact_gradient(logits, 2, z_t, k, 0, alpha_t)
        torch.testing.assert_close(gradient, slope, rtol=1e-8, atol=1e-9 * float(slope.abs().max()))


@pytest.mark.parametrize("k", MIXING_RATIOS)
def test_last_step_to_clean_text_is_the_reconstruction_term(k):
    """alpha_s = 1: z_s = x_0 for certain, so the divergence is -log p_theta(x_0 | z_t), Eq. 3."""
    logits = torch.linspace(-1, 1, N, dtype=F64)
    for z_t in (0, 2, 5) if k > 0 else (0, 2):
        for alpha_t in (0.0, 0.3, 0.9) if z_t != 2 or k > 0 else (0.3, 0.9):
            kl, gradient = one_token(logits, 2, z_t, k, 0, alpha_t, 1.0)
            assert kl == pytest.approx(exact_token(logits, 2, z_t, k, 0, alpha_t, 1.0), rel=1e-10, abs=1e-15)
            slope = exact_gradient(logits, 2, z_t, k, 0, alpha_t, 1.0)
            torch.testing.assert_close(gradient, slope, rtol=1e-8, atol=1e-14)


@pytest.mark.parametrize("k, m", GRID)
def test_no_time_no_divergence(k, m):
    case = draw_case(k, m)
    for alpha in (1 - case.t, torch.zeros(4, dtype=F64)):
        z_t = case.z_t if alpha.any() else torch.full_like(case.z_t, m)
        logits = case.logits.clone().requires_grad_()
        kl = kl_divergence(logits, case.x_0, z_t, alpha, alpha, kernel_of(case))
        (gradient,) = torch.autograd.grad(kl.sum(), logits)
        assert (kl == 0).all() and (gradient == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("gap", [100.0, 700.0, 1e4])
@pytest.mark.parametrize("k", MIXING_RATIOS)
def test_logits_far_apart(k, gap, dtype):
    """p_0 or p_z underflows; values equal mpmath, gradients are finite. At k = 0 the loss is the gap itself."""
    for top in (2, 5, 6):  # the token that the network is sure of: x_0, z_t or another
        logits = torch.full((N,), -gap, dtype=dtype)
        logits[top] = gap if gap == 1e4 else 0.0
        for z_t in (0, 2, 5) if k > 0 else (0, 2):
            for alpha_t, alpha_s in ((0.4, None), (0.4, 0.7), (0.4, 1.0), (0.0, 0.5)):
                if k == 0 and z_t == 2 and alpha_t == 0:
                    continue  # an unmasked token cannot occur at t = 1
                loss, gradient = one_token(logits, 2, z_t, k, 0, alpha_t, alpha_s)
                exact = exact_token(logits, 2, z_t, k, 0, alpha_t, alpha_s)
                assert loss == pytest.approx(exact, rel=1e-5, abs=1e-6), (top, z_t, alpha_t, alpha_s)
                assert torch.isfinite(gradient).all(), (top, z_t, alpha_t, alpha_s)


def test_underflow_at_an_unmasked_token_gives_zero_at_k_0():
    """r(z) = 0 and p_z = 0: the plain formula is 0 x log(0/0) there."""
    logits = torch.zeros(N)
    logits[2] = -1e4
    for alpha_t, alpha_s in ((0.4, None), (0.4, 0.7), (1.0, None), (0.4, 1.0), (1.0, 1.0)):
        loss, gradient = one_token(logits, 2, 2, 0.0, 0, alpha_t, alpha_s)
        assert loss == 0 and (gradient == 0).all()


def test_noise_that_k_0_cannot_make_has_no_loss():
    """Another ordinary token as z_t (text corrupted at k > 0, scored at k = 0): r(z) = 0, so 0 and not 0/0."""
    logits = torch.linspace(-1, 1, N)
    for alpha_t, alpha_s in ((0.4, None), (1.0, None), (0.0, None), (0.4, 0.7), (0.4, 1.0), (0.0, 0.5)):
        loss, gradient = one_token(logits, 2, 5, 0.0, 0, alpha_t, alpha_s)
        assert loss == 0 and (gradient == 0).all()


@pytest.mark.parametrize("k", MIXING_RATIOS)
def test_tokens_suppressed_by_the_caller(k):
    """Logits of -inf other than at x_0 are probabilities of zero; their gradient is zero."""
    logits = torch.tensor([0.0, -torch.inf, 1.0, 0.5, -torch.inf, 0.0, 0.0], dtype=F64)
    for z_t in (0, 4) if k > 0 else (0,):
        finite = torch.where(logits.isinf(), -2e3, logits)
        for alpha_s in (None, 0.7):
            loss, gradient = one_token(logits, 2, z_t, k, 0, 0.4, alpha_s)
            expected, slope = one_token(finite, 2, z_t, k, 0, 0.4, alpha_s)
            assert loss == pytest.approx(expected, rel=1e-14)
            torch.testing.assert_close(gradient, slope)
            assert (gradient[[1, 4]] == 0).all()


# --- the bound ------------------------------------------------------------------------------------------------
#
# The minimiser over p of the expected divergence is the law of x_0 at a position given z_t at the OTHER positions:
# z_t at the position itself enters through f_ts(e, z_t) and f_t(p, z_t). With one position it is the data law, and the
# reverse process is then exact, so that the bound is the entropy of the data: an equality to test against.


def log_data_law(N, m, seed=12):
    """A law over clean tokens, without [MASK]; as logits (N,)."""
    logits = torch.randn(N, dtype=F64, generator=torch.Generator().manual_seed(seed))
    return logits.index_fill(0, torch.tensor(m), -torch.inf).log_softmax(0)


def entropy(log_p):
    p = log_p.exp()
    return -(p * torch.where(p > 0, log_p, 0.0)).sum().item()


def unit_interval_quadrature(half_nodes=60, reach=3.4):
    """Tanh-sinh rule on (0, 1): nodes crowd both ends, where the integrand has log and k/N-wide corners."""
    h = reach / half_nodes
    u = h * torch.arange(-half_nodes, half_nodes + 1, dtype=F64)
    y = math.pi / 2 * u.sinh()
    return torch.sigmoid(2 * y), h * math.pi / 2 * u.cosh() / y.cosh().square() / 2


def expected_loss(per_token, log_p, alpha_t, noise):
    """E over x_0 ~ data and z_t ~ q(z_t | x_0) of per_token[row, x_0, z_t], for each row of alpha_t."""
    K, eye = noise.kernel(), torch.eye(noise.vocab_size, dtype=F64)
    forward = alpha_t[:, None, None] * eye + (1 - alpha_t)[:, None, None] * K  # [row, x_0, z_t]
    weight = log_p.exp()[None, :, None] * forward
    return torch.where(weight > 0, weight * per_token, 0.0).sum((1, 2))


def every_pair(rows, N):
    """x_0 and z_t ids of shape (rows, N * N) that run through all pairs."""
    x_0, z_t = torch.meshgrid(torch.arange(N), torch.arange(N), indexing="ij")
    return x_0.reshape(1, -1).expand(rows, -1), z_t.reshape(1, -1).expand(rows, -1)


@pytest.mark.parametrize("steps", [1, 2, 7])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("k, m", [(k, 2) for k in MIXING_RATIOS] + [(0.5, 0)])
def test_finite_step_bound_is_tight_for_the_true_reverse_process(k, m, name, steps):
    """One position, p = data law: the divergences of any number of steps, down to clean text, sum to the entropy."""
    size, noise = 5, Noise.mixing(5, k, m)
    log_p = log_data_law(size, m)
    alpha, _ = get_schedule(name)(torch.linspace(0, 1, steps + 1, dtype=F64))
    alpha_s, alpha_t = alpha[:-1], alpha[1:]
    x_0, z_t = every_pair(steps, size)
    kl = kl_divergence(log_p.expand(steps, size * size, size), x_0, z_t, alpha_s, alpha_t, NoiseKernel(size, k, m))
    total = expected_loss(kl.reshape(steps, size, size), log_p, alpha_t, noise).sum().item()
    assert total == pytest.approx(entropy(log_p), rel=1e-12)


def continuous_bound(logits_of_z, log_p, name, k, m):
    """Integral over t of the expected objective; logits_of_z(alpha_t) gives (T, N, N), one row of logits per z_t."""
    size, noise = log_p.numel(), Noise.mixing(log_p.numel(), k, m)
    t, weights = unit_interval_quadrature()
    alpha_t, d_alpha_t = get_schedule(name)(t)
    x_0, z_t = every_pair(len(t), size)
    logits = logits_of_z(alpha_t)[:, None].expand(-1, size, -1, -1).reshape(len(t), size * size, size)
    loss = diffusion_loss(logits, x_0, z_t, alpha_t, d_alpha_t, NoiseKernel(size, k, m))
    return (weights * expected_loss(loss.reshape(-1, size, size), log_p, alpha_t, noise)).sum().item()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("k", MIXING_RATIOS)
def test_continuous_bound_is_tight_for_the_true_reverse_process(k, name):
    """One position, p = data law: the integral of Eq. 15 over t is the entropy, whatever the schedule."""
    log_p = log_data_law(5, 2)
    bound = continuous_bound(lambda alpha_t: log_p.expand(len(alpha_t), 5, 5), log_p, name, k, 2)
    assert bound == pytest.approx(entropy(log_p), rel=1e-8)


@pytest.mark.parametrize("k", [0.1, 0.5, 1.0])
def test_posterior_of_the_clean_token_is_not_the_minimiser(k):
    """p(x_0 | z_t), which looks at z_t itself, counts that evidence twice: its bound lies above the entropy."""
    log_p, noise = log_data_law(5, 2), Noise.mixing(5, k, 2)

    def bayes(alpha_t):
        forward = alpha_t[:, None, None] * torch.eye(5, dtype=F64) + (1 - alpha_t)[:, None, None] * noise.kernel()
        return forward.transpose(1, 2).log() + log_p  # [row, z_t, x_0]

    excess = continuous_bound(bayes, log_p, "linear", k, 2) - entropy(log_p)
    assert excess > 0.05 * k


def two_position_bound(joint, k, m, alpha_t, divergence):
    """E of the per-sequence loss for two dependent positions, p = law of x_0 at one given z_t at the other, per row."""
    size, noise, K = joint.shape[0], Noise.mixing(joint.shape[0], k, m), Noise.mixing(joint.shape[0], k, m).kernel()
    forward = alpha_t[:, None, None] * torch.eye(size, dtype=F64) + (1 - alpha_t)[:, None, None] * K
    rows, total = len(alpha_t), torch.zeros(len(alpha_t), dtype=F64)
    x_0, z_t = every_pair(rows, size)
    for law in (joint, joint.T):  # law[x here, x there]
        here_and_z_there = torch.einsum("xy,ryv->rvx", law, forward)  # [row, z there, x here]
        for v in range(size):
            logits = here_and_z_there[:, v].log()
            loss = divergence(logits[:, None].expand(-1, size * size, -1), x_0, z_t).reshape(rows, size, size)
            weight = here_and_z_there[:, v, :, None] * forward
            total = total + torch.where(weight > 0, weight * loss, 0.0).sum((1, 2))
    assert noise.vocab_size == size
    return total


@pytest.mark.parametrize("k", MIXING_RATIOS)
def test_finite_step_bound_falls_to_the_continuous_one_which_is_the_entropy(k):
    """Two dependent positions, the best p: sums of divergences over T steps fall to the integral like 1/T.

    A step that changes both positions at once cannot be exact when they are drawn independently: those sums lie above
    the negative log-likelihood of the data. In continuous time one position changes at a time, and the bound is tight.
    """
    size, m = 4, 0
    joint = torch.rand(size, size, dtype=F64, generator=torch.Generator().manual_seed(13)).pow(3)
    joint += torch.eye(size, dtype=F64)
    joint[m] = joint[:, m] = 0
    joint /= joint.sum()
    kernel, schedule = NoiseKernel(size, k, m), get_schedule("linear")

    def sum_over_steps(T):
        alpha, _ = schedule(torch.linspace(0, 1, T + 1, dtype=F64))
        rates = alpha[:-1], alpha[1:]
        step = two_position_bound(joint, k, m, alpha[1:], lambda p, x, z: kl_divergence(p, x, z, *rates, kernel))
        return step.sum().item()

    t, weights = unit_interval_quadrature()
    alpha_t, slope = schedule(t)
    rate = two_position_bound(joint, k, m, alpha_t, lambda p, x, z: diffusion_loss(p, x, z, alpha_t, slope, kernel))
    limit = (weights * rate).sum().item()
    sums = [sum_over_steps(T) for T in (8, 32, 128, 512)]
    assert limit == pytest.approx(entropy(joint[joint > 0].log()), rel=1e-8)
    assert sums[0] > sums[1] > sums[2] > sums[3] > limit + 1e-5
    assert 3.5 < (sums[1] - limit) / (sums[2] - limit) < 4.5 and 3.5 < (sums[2] - limit) / (sums[3] - limit) < 4.5


# --- contracts ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, F64])
@pytest.mark.parametrize("k", [0.0, 0.1, 1.0])
def test_dtypes_and_untouched_arguments(k, dtype):
    """float64 in, float64 out; else float32. Gradients have the logits' dtype. Nothing passed in is written to."""
    case = draw_case(k, 0)
    alpha_s, alpha_t, d_alpha_t = rates(case, "linear")
    logits, x_0, z_t = case.logits.to(dtype), case.x_0, case.z_t
    arguments = (logits, x_0, z_t, alpha_s, alpha_t, d_alpha_t)
    before = [a.clone() for a in arguments]
    hidden, weight = logits.clone(), torch.eye(N, dtype=dtype)
    leaf = logits.clone().requires_grad_()
    for needs_grad in (False, True):
        inputs = leaf if needs_grad else logits
        results = (
            kl_divergence(inputs, x_0, z_t, alpha_s, alpha_t, kernel_of(case)),
            diffusion_loss(inputs, x_0, z_t, alpha_t, d_alpha_t, kernel_of(case)),
            *fused_linear_diffusion_loss(inputs, weight, x_0, z_t, alpha_t, d_alpha_t, kernel_of(case), chunk_size=3),
        )
        for loss in results:
            assert loss.dtype == (F64 if dtype == F64 else torch.float32)
            if needs_grad and loss.requires_grad:
                (gradient,) = torch.autograd.grad(loss.sum(), leaf)
                assert gradient.dtype == dtype and gradient.shape == leaf.shape
        assert results[2].shape == () and not results[3].requires_grad
    assert all(torch.equal(a, b) for a, b in zip(arguments, before, strict=True))
    assert torch.equal(leaf.detach(), logits) and torch.equal(hidden, logits)
    assert torch.equal(weight, torch.eye(N, dtype=dtype))


def test_strided_logits():
    """A transposed view and an expanded row: neither contiguous, both read correctly."""
    case = draw_case(0.5, 0)
    _, alpha_t, d_alpha_t = rates(case, "linear")
    args = case.x_0, case.z_t, alpha_t, d_alpha_t, kernel_of(case)
    expected = diffusion_loss(case.logits, *args)
    view = case.logits.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    assert torch.equal(diffusion_loss(view, *args), expected)
    row = case.logits[:1, :1].expand(4, 5, N)
    leaf = case.logits[:1, :1].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(diffusion_loss(leaf.expand(4, 5, N), *args).sum(), leaf)
    dense = row.clone().requires_grad_()
    (cells,) = torch.autograd.grad(diffusion_loss(dense, *args).sum(), dense)
    torch.testing.assert_close(gradient[0, 0], cells.sum((0, 1)))


@pytest.mark.parametrize("shape", [(2, 0), (0, 3), (0, 0)], ids=str)
def test_no_token_no_loss(shape):
    """L = 0 or B = 0 gives empty results and gradients, not an error."""
    ids, alpha, kernel = torch.empty(shape, dtype=torch.long), torch.full(shape[:1], 0.5), NoiseKernel(N, 0.1, 0)
    logits = torch.empty(*shape, N, requires_grad=True)
    for loss in (
        kl_divergence(logits, ids, ids, alpha, alpha, kernel),
        diffusion_loss(logits, ids, ids, alpha, -alpha, kernel),
        fused_linear_diffusion_loss(logits, torch.eye(N), ids, ids, alpha, -alpha, kernel)[1],
    ):
        assert loss.shape == shape
    total, _ = fused_linear_diffusion_loss(logits, torch.eye(N), ids, ids, alpha, -alpha, kernel)
    (diffusion_loss(logits, ids, ids, alpha, -alpha, kernel).sum() + total).backward()
    assert total == 0 and logits.grad.shape == (*shape, N)


def test_rows_do_not_see_each_other():
    """A token's loss is the same alone, in another order and beside an outlier."""
    case = draw_case(0.1, 0)
    _, alpha_t, d_alpha_t = rates(case, "linear")
    whole = diffusion_loss(case.logits, case.x_0, case.z_t, alpha_t, d_alpha_t, kernel_of(case))
    for b in range(4):
        for i in range(5):
            cell = (slice(b, b + 1), slice(i, i + 1))
            rows = case.logits[cell], case.x_0[cell], case.z_t[cell], alpha_t[b : b + 1], d_alpha_t[b : b + 1]
            assert torch.equal(diffusion_loss(*rows, kernel_of(case)), whole[cell])


@pytest.mark.parametrize("rows", [1, 3, 19])
def test_row_blocks_change_nothing(rows, monkeypatch):
    """Losses and gradients are the same bit for bit when the vocabulary passes take a few rows at a time."""
    case = draw_case(0.1, 0)
    hidden, weight, token_weights, args = fused_setting(0.1)

    def everything():
        logits = case.logits.clone().requires_grad_()
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        loss = diffusion_loss(logits, *args)
        total, per_token = fused_linear_diffusion_loss(h, w, *args, token_weights=token_weights, chunk_size=20)
        gradients = torch.autograd.grad((token_weights * loss).sum() + total, (logits, h, w))
        return loss.detach(), total.detach(), per_token, *gradients

    whole = everything()
    monkeypatch.setattr("xdlm_hf.diffusion.ops.rows.BLOCK_ELEMENTS", {"cpu": rows * N, "other": rows * N})
    assert all(torch.equal(a, b) for a, b in zip(everything(), whole, strict=True))


# --- fused ----------------------------------------------------------------------------------------------------


def fused_setting(k, dtype=F64, dim=4):
    case = draw_case(k, 2)
    generator = torch.Generator().manual_seed(11)
    hidden = torch.randn(4, 5, dim, dtype=F64, generator=generator).to(dtype)
    weight = torch.randn(N, dim, dtype=F64, generator=generator).to(dtype)
    token_weights = torch.rand(4, 5, dtype=F64, generator=generator)
    token_weights[1, 2:] = 0.0
    _, alpha_t, d_alpha_t = rates(case, "cosine")
    return hidden, weight, token_weights, (case.x_0, case.z_t, alpha_t, d_alpha_t, kernel_of(case))


@pytest.mark.parametrize("chunk_size", [1, 3, 7, 20, 1000, None])
@pytest.mark.parametrize("k", MIXING_RATIOS)
def test_fused_equals_plain(k, chunk_size):
    hidden, weight, token_weights, args = fused_setting(k)
    hidden.requires_grad_(), weight.requires_grad_()
    plain = diffusion_loss(hidden @ weight.T, *args)
    total, per_token = fused_linear_diffusion_loss(
        hidden, weight, *args, token_weights=token_weights, chunk_size=chunk_size
    )
    torch.testing.assert_close(per_token, plain.detach(), rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(total, (token_weights * plain).sum(), rtol=1e-10, atol=0)
    ours = torch.autograd.grad(3.0 * total, (hidden, weight))
    theirs = torch.autograd.grad(3.0 * (token_weights * plain).sum(), (hidden, weight))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)


def test_fused_without_weights_sums_all_tokens():
    hidden, weight, _, args = fused_setting(0.1)
    total, per_token = fused_linear_diffusion_loss(hidden, weight, *args)
    assert total.item() == pytest.approx(per_token.sum().item(), rel=1e-14)
    assert not total.requires_grad


@pytest.mark.parametrize("frozen", ["weight", "hidden"])
def test_fused_with_a_frozen_part(frozen):
    hidden, weight, token_weights, args = fused_setting(0.1)
    leaf = hidden if frozen == "weight" else weight
    leaf.requires_grad_()
    total, _ = fused_linear_diffusion_loss(hidden, weight, *args, token_weights=token_weights, chunk_size=6)
    total.backward()
    plain = (token_weights * diffusion_loss(hidden @ weight.T, *args)).sum()
    (expected,) = torch.autograd.grad(plain, leaf)
    torch.testing.assert_close(leaf.grad, expected, rtol=1e-10, atol=1e-13)
    assert (weight if frozen == "weight" else hidden).grad is None


def test_fused_with_a_tied_head():
    """The embedding is the head: its gradient is the sum of both uses."""
    _, weight, token_weights, args = fused_setting(0.1)
    weight.requires_grad_()
    hidden = torch.tanh(torch.nn.functional.embedding(args[1], weight))
    total, _ = fused_linear_diffusion_loss(hidden, weight, *args, token_weights=token_weights, chunk_size=6)
    (ours,) = torch.autograd.grad(total, weight, retain_graph=True)
    plain = (token_weights * diffusion_loss(hidden @ weight.T, *args)).sum()
    (theirs,) = torch.autograd.grad(plain, weight)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("k", [0.0, 0.1, 1.0])
def test_fused_in_bfloat16_is_as_good_as_plain(k):
    """Both against float64 on the same bfloat16 numbers: the fused gradient is no worse than twice the plain one."""
    hidden, weight, token_weights, args = fused_setting(k, torch.bfloat16, dim=16)
    results = {}
    for name, dtype in (("fused", torch.bfloat16), ("plain", torch.bfloat16), ("exact", F64)):
        h, w = hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()
        if name == "fused":
            total, _ = fused_linear_diffusion_loss(h, w, *args, token_weights=token_weights, chunk_size=6)
        else:
            total = (token_weights * diffusion_loss(h @ w.T, *args)).sum()
        gradients = torch.autograd.grad(total, (h, w))
        assert all(g.dtype == dtype for g in gradients)
        results[name] = (total.double(), *(g.double() for g in gradients))
    for ours, plain, exact in zip(*(results[n] for n in ("fused", "plain", "exact")), strict=True):
        allowed = 2 * (plain - exact).norm() + 2**-8 * exact.norm()
        assert (ours - exact).norm() <= allowed


def test_fused_adds_up_many_chunks_in_float32():
    """2000 chunks of one token: a bfloat16 sum would stop growing after a few hundred. Relative error under 1 %."""
    hidden = torch.ones(1, 2000, 2, dtype=torch.bfloat16)
    weight = torch.zeros(N, 2, dtype=torch.bfloat16, requires_grad=True)
    ids = torch.full((1, 2000), 3), torch.zeros(1, 2000, dtype=torch.long)
    rates = torch.tensor([0.5]), torch.tensor([-1.0])
    total, _ = fused_linear_diffusion_loss(hidden, weight, *ids, *rates, NoiseKernel(N, 0.1, 0), chunk_size=1)
    (gradient,) = torch.autograd.grad(total, weight)
    exact = weight.detach().double().requires_grad_()
    plain = diffusion_loss(hidden.double() @ exact.T, *ids, *rates, NoiseKernel(N, 0.1, 0))
    (expected,) = torch.autograd.grad(plain.sum(), exact)
    torch.testing.assert_close(gradient.double(), expected, rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("k", [0.0, 0.1, 1.0])
def test_fused_under_autocast(k):
    """bfloat16 autocast: same loss and gradients as the plain loss under autocast, to bfloat16; float32 results."""
    hidden, weight, token_weights, args = fused_setting(k, torch.float32, dim=16)
    results = []
    for fused in (True, False):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            if fused:
                total, _ = fused_linear_diffusion_loss(h, w, *args, token_weights=token_weights, chunk_size=6)
            else:
                total = (token_weights * diffusion_loss(torch.nn.functional.linear(h, w), *args)).sum()
        total.backward()
        assert total.dtype in (torch.float32, F64) and h.grad.dtype == w.grad.dtype == torch.float32
        results.append((total.detach().double(), h.grad, w.grad))
    for a, b in zip(*results, strict=True):
        assert (a - b).norm() <= 2e-2 * b.norm()


def test_fused_takes_zero_weight_as_no_token():
    """A padded position contributes nothing to the sum or the gradient, whatever stands there."""
    hidden, weight, token_weights, args = fused_setting(0.1)
    hidden[1, 2:] = 1e3
    hidden.requires_grad_()
    total, _ = fused_linear_diffusion_loss(hidden, weight, *args, token_weights=token_weights)
    (gradient,) = torch.autograd.grad(total, hidden)
    assert torch.isfinite(total) and (gradient[1, 2:] == 0).all() and (gradient[1, :2] != 0).any()


# --- refusals -------------------------------------------------------------------------------------------------


def call_kl(logits, x_0, z_t, alpha_t, kernel):
    return kl_divergence(logits, x_0, z_t, torch.ones(2), alpha_t, kernel)


def call_loss(logits, x_0, z_t, alpha_t, kernel):
    return diffusion_loss(logits, x_0, z_t, alpha_t, -torch.ones(2), kernel)


def call_fused(logits, x_0, z_t, alpha_t, kernel):
    return fused_linear_diffusion_loss(logits, torch.eye(N), x_0, z_t, alpha_t, -torch.ones(2), kernel)


@pytest.mark.parametrize("function", [call_kl, call_loss, call_fused])
class TestRefusals:
    kernel = NoiseKernel(N, 0.5, 0)
    logits, ids, alpha_t = torch.zeros(2, 3, N), torch.ones(2, 3, dtype=torch.long), torch.tensor([0.5, 0.4])

    @pytest.mark.parametrize("bad", [-1, -100, N])
    @pytest.mark.parametrize("name", ["x_0", "z_t"])
    def test_ids_outside_the_vocabulary(self, function, name, bad):
        ids = {"x_0": self.ids.clone(), "z_t": self.ids.clone()}
        ids[name][1, 2] = bad
        with pytest.raises(ValueError, match=rf"{name} holds token id {bad}, outside \[0, {N}\)"):
            function(self.logits, ids["x_0"], ids["z_t"], self.alpha_t, self.kernel)

    @pytest.mark.parametrize("bad", [-0.5, 1.5, float("nan")])
    def test_rates_outside_the_unit_interval(self, function, bad):
        with pytest.raises(ValueError, match=rf"alpha_t holds {bad:g}; a signal rate lies in \[0, 1\]"):
            function(self.logits, self.ids, self.ids, torch.tensor([0.5, bad]), self.kernel)

    def test_shapes_that_disagree(self, function):
        with pytest.raises(ValueError, match=r"\(2, 2\) and \(2, 3, 7\)|x_0 \(2, 3\) and z_t \(2, 2\)"):
            function(self.logits, self.ids, self.ids[:, 1:], self.alpha_t, self.kernel)
        with pytest.raises(ValueError, match=r"\(2, 3, 6\)|\(7, 6\)"):
            function(self.logits[..., 1:], self.ids, self.ids, self.alpha_t, self.kernel)
        with pytest.raises(ValueError, match="does not fit ids of shape"):
            function(self.logits, self.ids, self.ids, torch.full((3,), 0.5), self.kernel)


def test_time_running_backwards_is_refused():
    case = draw_case(0.5, 0)
    alpha = torch.tensor([0.9, 0.5, 0.4, 0.3])
    with pytest.raises(ValueError, match=r"alpha_s=0.4 < alpha_t=0.45.*\(s < t\)"):
        low = torch.tensor([0.9, 0.5, 0.45, 0.3])
        kl_divergence(case.logits, case.x_0, case.z_t, alpha, low, kernel_of(case))


def test_a_rising_signal_is_refused():
    case = draw_case(0.5, 0)
    alpha_t = torch.full((4,), 0.5)
    with pytest.raises(ValueError, match="d_alpha_t holds 1; a signal rate falls"):
        diffusion_loss(case.logits, case.x_0, case.z_t, alpha_t, torch.tensor([-1.0, 1.0, 0, 0]), kernel_of(case))


def test_fused_refuses_what_does_not_fit():
    hidden, weight, token_weights, args = fused_setting(0.1)
    with pytest.raises(ValueError, match=r"weight of shape \(6, 4\) must be \(N, D\) = \(7, 4\)"):
        fused_linear_diffusion_loss(hidden, weight[1:], *args)
    with pytest.raises(ValueError, match=r"token_weights of shape \(4, 4\) must be \(4, 5\)"):
        fused_linear_diffusion_loss(hidden, weight, *args, token_weights=token_weights[:, 1:])
    with pytest.raises(ValueError, match="chunk_size=0 must be positive"):
        fused_linear_diffusion_loss(hidden, weight, *args, chunk_size=0)
    with pytest.raises(ValueError, match=r"hidden of shape \(4, 4, 4\) must be \(B, L, D\)"):
        fused_linear_diffusion_loss(hidden[:, 1:], weight, *args)


def test_a_slope_that_is_no_number_is_refused():
    ids, kernel = torch.ones(1, 2, dtype=torch.long), NoiseKernel(4, 0.1, 0)
    with pytest.raises(ValueError, match="d_alpha_t holds nan; a signal rate falls"):
        diffusion_loss(torch.randn(1, 2, 4), ids, ids, torch.tensor([0.5]), torch.tensor([torch.nan]), kernel)
