"""The loss as a bound: for the true reverse process it is the entropy of the data, and for no other below it."""

import math

import pytest
import torch
from loss_cases import F64, NAMES

from reference import (
    MIXING_RATIOS,
    Noise,
)
from xdlm_hf.diffusion.losses import diffusion_loss, kl_divergence
from xdlm_hf.diffusion.noise import NoiseKernel
from xdlm_hf.diffusion.schedules import get_schedule

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
