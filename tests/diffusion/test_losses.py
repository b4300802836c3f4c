"""Finite-step divergence, continuous objective and fused twin against the dense oracle (Eqs. 4, 12-15, 17, 19).

Two yardsticks: float64 matrices where they are exact enough (relative error 1e-10), mpmath where float64 itself cancels
(alpha near 0 or 1, p near one-hot).
"""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from loss_cases import F64, GRID, NAMES, N, exact_gradient, exact_token, fused_setting, kernel_of, one_token, rates

from reference import (
    MASK_IDS,
    MIXING_RATIOS,
    Noise,
    batch_kl,
    batch_objective,
    clean_distribution,
    draw_case,
    draw_forward,
    exact_objective,
    udlm_rate,
)
from xdlm_hf.diffusion.losses import diffusion_loss, kl_divergence
from xdlm_hf.diffusion.noise import NoiseKernel
from xdlm_hf.diffusion.ops.fused import fused_linear_diffusion_loss

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
