"""Losses and gradients where plain float arithmetic cancels, overflows or divides by zero, against mpmath."""

import math

import pytest
import torch
from loss_cases import F64, GRID, N, exact_gradient, exact_token, kernel_of, one_token

from reference import (
    MIXING_RATIOS,
    Noise,
    clean_distribution,
    draw_case,
    draw_forward,
)
from xdlm_hf.diffusion.losses import diffusion_loss, kl_divergence
from xdlm_hf.diffusion.noise import NoiseKernel

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
