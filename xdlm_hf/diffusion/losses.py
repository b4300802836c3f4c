"""Training losses: the finite-step divergence (Eqs. 12, 13) and its continuous-time limit (Eqs. 14, 15).

`objective` has the formula, `ops.rows` the sums over the vocabulary, `ops.fused` the loss fused with the output layer.
The losses depend on the network only through p = softmax(logits), [MASK] row excluded when k < 1.

t = 0 is clean, t = 1 is noise, s < t. Losses are in nats per token. N counts every row of the output layer, [MASK] and
padding rows included. Shapes: B batch, L length, N vocabulary, M tokens.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .checks import check_shapes, check_step, check_targets, work_dtype
from .noise import NoiseDistribution, NoiseKernel
from .objective import TokenTerms, finite_step_terms, limit_terms, token_losses
from .ops.rows import gradient_scalars, logit_statistics, row_gradients


# The public functions run outside torch.compile's graphs, which would unroll their loops over blocks and chunks.
@torch.compiler.disable
def kl_divergence(
    logits: Tensor, x_0: Tensor, z_t: Tensor, alpha_s: Tensor, alpha_t: Tensor, kernel: NoiseKernel
) -> Tensor:
    """Divergence of one reverse step, D_KL(q(z_s | z_t, x_0) || p_theta(z_s | z_t)), Eqs. 12, 13.

    Args:
        logits: Network output, (B, L, N), float of any dtype. Not modified.
        x_0: Clean ids, (B, L).
        z_t: Noisy ids, (B, L), drawn from q(z_t | x_0).
        alpha_s, alpha_t: Signal rates, (B,) or (B, 1), 0 <= alpha_t <= alpha_s <= 1.
        kernel: The noise kernel.

    Returns:
        Nats per token, (B, L), float64 for float64 logits and float32 otherwise; differentiable in `logits`.

    Raises:
        ValueError: If some alpha_s < alpha_t, a rate leaves [0, 1], an id is not in [0, N), or shapes disagree.

    Source: Lemma 3.4. k = 0 gives Eq. 17.
    """
    alpha_s, alpha_t = check_step(logits, z_t, alpha_s, alpha_t, kernel.vocab_size)
    check_targets(x_0, z_t, kernel.vocab_size)
    return dense_loss(logits, finite_step_terms(x_0, z_t, alpha_s, alpha_t, kernel), kernel)


@torch.compiler.disable
def diffusion_loss(
    logits: Tensor, x_0: Tensor, z_t: Tensor, alpha_t: Tensor, d_alpha_t: Tensor, kernel: NoiseKernel
) -> Tensor:
    """Integrand of the continuous-time bound, Eq. 15: its mean over t ~ U(0, 1) and z_t is the NELBO per token.

        loss = -alpha'_t r(z_t) / f_t(x, z_t) * h_t(x, z_t, p)

    Args:
        logits: Network output, (B, L, N), float of any dtype. Not modified.
        x_0: Clean ids, (B, L).
        z_t: Noisy ids, (B, L), drawn from q(z_t | x_0).
        alpha_t: Signal rates, (B,) or (B, 1), in [0, 1].
        d_alpha_t: Slopes alpha'_t, (B,) or (B, 1), not positive.
        kernel: The noise kernel.

    Returns:
        Nats per token, (B, L), float64 for float64 logits and float32 otherwise; differentiable in `logits`.

    Raises:
        ValueError: If a rate leaves [0, 1], a slope is positive, an id is not in [0, N), or shapes disagree.

    Source: Eqs. 14, 15. k = 0 is the MDLM loss (Eq. 17), k = 1 the UDLM loss (Eq. 19 with its signs corrected).
    """
    check_shapes(logits, z_t, kernel.vocab_size)
    terms = limit_terms(x_0, z_t, alpha_t, d_alpha_t, kernel)
    return dense_loss(logits, terms, kernel)


def dense_loss(logits: Tensor, terms: TokenTerms, noise: NoiseDistribution) -> Tensor:
    """Losses (B, L) in nats of logits (B, L, N), from the terms of the tokens in row-major order."""
    with_gradient = torch.is_grad_enabled() and logits.requires_grad
    per_token = _DiffusionLoss.apply(logits.reshape(-1, logits.shape[-1]), terms, noise, with_gradient)
    return per_token.reshape(logits.shape[:-1])


class _DiffusionLoss(torch.autograd.Function):
    """Losses (M,) of logits (M, N). Saves the logits and six numbers per token for the closed-form gradient."""

    @staticmethod
    def forward(ctx, logits: Tensor, terms: TokenTerms, noise: NoiseDistribution, with_gradient: bool) -> Tensor:
        statistics = logit_statistics(logits, terms, noise, with_gradient)
        ctx.save_for_backward(logits)
        ctx.statistics, ctx.terms, ctx.noise = statistics, terms, noise
        return token_losses(statistics, terms).to(work_dtype(logits))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_losses: Tensor):
        (logits,) = ctx.saved_tensors
        terms = gradient_scalars(ctx.statistics, ctx.terms, ctx.noise, grad_losses.double(), logits)
        gradient = torch.empty_like(logits)
        row_gradients(logits, gradient, terms, ctx.noise)
        return gradient, None, None, None
