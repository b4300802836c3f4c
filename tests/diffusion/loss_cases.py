"""Cases of the loss tests, and one token's loss and gradient: by the package, and exactly by mpmath."""

import mpmath
import torch

from reference import (
    MASK_IDS,
    MIXING_RATIOS,
    VOCABULARY,
    Noise,
    draw_case,
    exact_kl,
    exact_objective,
    exact_softmax,
)
from xdlm_hf.diffusion.losses import diffusion_loss, kl_divergence
from xdlm_hf.diffusion.noise import NoiseKernel
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


def fused_setting(k, dtype=F64, dim=4):
    case = draw_case(k, 2)
    generator = torch.Generator().manual_seed(11)
    hidden = torch.randn(4, 5, dim, dtype=F64, generator=generator).to(dtype)
    weight = torch.randn(N, dim, dtype=F64, generator=generator).to(dtype)
    token_weights = torch.rand(4, 5, dtype=F64, generator=generator)
    token_weights[1, 2:] = 0.0
    _, alpha_t, d_alpha_t = rates(case, "cosine")
    return hidden, weight, token_weights, (case.x_0, case.z_t, alpha_t, d_alpha_t, kernel_of(case))
