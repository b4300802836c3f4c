"""The loss fused with the output layer, which computes the logits of one chunk of tokens at a time.

Shapes: B batch, L length, D width, N vocabulary, M tokens with a loss.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..categorical import per_device
from ..checks import work_dtype
from ..noise import NoiseDistribution, NoiseKernel
from ..objective import LogitStatistics, TokenTerms, limit_terms, token_losses
from .rows import add_sparse_part, gradient_scalars, logit_statistics, row_gradients, set_sparse_part

# Tokens whose logits the fused loss holds at a time.
CHUNK_TOKENS = {"cpu": 192, "other": 1024}


@torch.compiler.disable
def fused_linear_diffusion_loss(
    hidden: Tensor,
    weight: Tensor,
    x_0: Tensor,
    z_t: Tensor,
    alpha_t: Tensor,
    d_alpha_t: Tensor,
    kernel: NoiseKernel,
    token_weights: Tensor | None = None,
    chunk_size: int | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`diffusion_loss(hidden @ weight.T + bias, ...)` without the logits of more than `chunk_size` tokens at a time.

    In float32 the forward pass also accumulates the gradients, chunk by chunk. The gradient of a float16 or bfloat16
    weight would be rounded at every chunk; there the backward pass recomputes the logits, of all tokens for one slice
    of the vocabulary at a time, so that each row of the gradient is rounded once.

    Args:
        hidden: Last hidden states, (B, L, D).
        weight: Output layer, (N, D).
        x_0, z_t, alpha_t, d_alpha_t, kernel: As in `diffusion_loss`.
        token_weights: Weight of each token in the sum, (B, L); default 1 for all.
        chunk_size: Tokens per chunk; default 192 on a CPU, 1024 on a GPU.
        bias: Of the output layer, (N,), if it has one.

    Returns:
        `(total, per_token)`: the scalar sum of token_weights * loss, which carries the gradient to `hidden`, `weight`
        and `bias`, and the unweighted losses in nats, (B, L), detached. float64 for float64 `hidden`, else float32.

    Raises:
        ValueError: As `diffusion_loss`, or if `weight`, `bias`, their dtypes, `token_weights` or `chunk_size` do not
            fit.

    Under autocast the product runs in autocast's dtype, as that of `torch.nn.functional.linear`.
    """
    terms = limit_terms(x_0, z_t, alpha_t, d_alpha_t, kernel)
    return fused_loss(hidden, weight, tuple(x_0.shape), terms, kernel, token_weights, chunk_size, bias)


@torch.compiler.disable
def fused_loss(
    hidden: Tensor,
    weight: Tensor,
    shape: tuple[int, int],
    terms: TokenTerms,
    noise: NoiseDistribution,
    token_weights: Tensor | None = None,
    chunk_size: int | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`fused_linear_diffusion_loss` of ids of the given shape (B, L), from the terms of their tokens in order."""
    if hidden.ndim != 3 or tuple(hidden.shape[:2]) != shape:
        raise ValueError(f"hidden of shape {tuple(hidden.shape)} must be (B, L, D) for ids {shape}.")
    if tuple(weight.shape) != (noise.vocab_size, hidden.shape[-1]):
        raise ValueError(
            f"weight of shape {tuple(weight.shape)} must be (N, D) = ({noise.vocab_size}, {hidden.shape[-1]})."
        )
    if bias is not None and tuple(bias.shape) != (noise.vocab_size,):
        raise ValueError(f"bias of shape {tuple(bias.shape)} must be (N,) = ({noise.vocab_size},).")
    hidden, weight, bias = (None if x is None else _as_autocast_would(x) for x in (hidden, weight, bias))
    for name, x in (("weight", weight), ("bias", bias)):
        if x is not None and hidden.dtype != x.dtype:
            raise ValueError(f"hidden is {hidden.dtype} and {name} {x.dtype}: cast one, or run under autocast.")
    if chunk_size is None:
        chunk_size = per_device(CHUNK_TOKENS, hidden.device)
    if chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size} must be positive.")
    if token_weights is None:
        token_weights = torch.ones(shape, dtype=torch.float64, device=hidden.device)
    if tuple(token_weights.shape) != shape:
        raise ValueError(f"token_weights of shape {tuple(token_weights.shape)} must be {shape}.")
    tokens, token_weights = hidden.reshape(-1, hidden.shape[-1]), token_weights.detach().double().reshape(-1)
    scored = terms.scale > 0
    if not scored.all():  # at k = 0 the masked positions alone go through the output layer
        tokens, token_weights, terms = tokens[scored], token_weights[scored], terms.rows(scored)
    inputs = (x for x in (hidden, weight, bias) if x is not None)
    with_gradient = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    objective = _LossArguments(terms, token_weights, noise, chunk_size)
    total, losses = _FusedLinearLoss.apply(tokens, weight, bias, objective, with_gradient)
    per_token = torch.zeros(scored.shape, dtype=losses.dtype, device=losses.device)
    per_token[scored] = losses
    return total, per_token.reshape(shape)


@dataclass(frozen=True)
class _LossArguments:
    """Arguments of the fused loss besides hidden states and weight."""

    terms: TokenTerms
    token_weights: Tensor  # (M,) float64
    noise: NoiseDistribution
    chunk_size: int


class _FusedLinearLoss(torch.autograd.Function):
    """Weighted sum and losses (M,) of hidden states (M, D) and output layer, weight (N, D) and bias (N,) or None."""

    @staticmethod
    def forward(
        ctx, hidden: Tensor, weight: Tensor, bias: Tensor | None, objective: _LossArguments, with_gradient: bool
    ):
        # A float32 or wider gradient can be accumulated over chunks; that of `hidden` needs no accumulation.
        full_precision = weight.dtype in (torch.float32, torch.float64)
        ctx.by_chunks = full_precision or (weight.dtype == torch.bfloat16 and not ctx.needs_input_grad[1])
        ctx.save_for_backward(hidden, weight, bias)
        ctx.dtype, ctx.objective = hidden.dtype, objective
        needed = ctx.needs_input_grad[:3] if with_gradient and ctx.by_chunks else (False, False, False)
        ctx.statistics, *ctx.gradients = _by_token_chunks(hidden, weight, bias, needed, with_gradient, objective)
        losses = token_losses(ctx.statistics, objective.terms)
        total, per_token = (x.to(work_dtype(hidden)) for x in ((objective.token_weights * losses).sum(), losses))
        ctx.mark_non_differentiable(per_token)
        return total, per_token

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_total: Tensor, _):
        needed = ctx.needs_input_grad[:3]
        if ctx.by_chunks:
            # Returned without a copy, to save memory; a second backward pass recomputes them.
            gradients, ctx.gradients = ctx.gradients, None
            if gradients is None:
                _, *gradients = _by_token_chunks(*ctx.saved_tensors, needed, True, ctx.objective)
            gradients = [gradient if gradient is None else gradient.mul_(grad_total) for gradient in gradients]
        else:
            gradients = _by_vocabulary_slices(*ctx.saved_tensors, needed, grad_total, ctx.statistics, ctx.objective)
        return *(gradient if gradient is None else gradient.to(ctx.dtype) for gradient in gradients), None, None


def _by_token_chunks(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    needed: tuple[bool, bool, bool],
    with_gradient: bool,
    objective: _LossArguments,
) -> tuple[LogitStatistics, Tensor | None, Tensor | None, Tensor | None]:
    """Statistics of the logits hidden @ weight.T + bias, and the gradients needed, computed in chunks of tokens."""
    tokens, noise = hidden.shape[0], objective.noise
    size = math.ceil(tokens / max(1, math.ceil(tokens / objective.chunk_size)))  # no small chunk is left over
    grad_hidden = torch.empty_like(hidden, dtype=work_dtype(hidden)) if needed[0] else None
    grad_weight = torch.empty_like(weight) if needed[1] else None
    grad_bias = torch.zeros_like(bias, dtype=work_dtype(bias)) if needed[2] else None
    buffer, statistics = hidden.new_empty(size, weight.shape[0]), []
    for start in range(0, max(1, tokens), max(1, size)):
        rows = slice(start, start + size)
        chunk, terms = hidden[rows], objective.terms.rows(rows)
        logits = _logits(chunk, weight, bias, buffer[: chunk.shape[0]])
        statistics.append(logit_statistics(logits, terms, noise, with_gradient))
        if any(needed):
            gradient_terms = gradient_scalars(statistics[-1], terms, noise, objective.token_weights[rows], logits)
            row_gradients(logits, logits, gradient_terms, noise, sparse_part=grad_hidden is None)
        if grad_hidden is not None:
            grad_hidden[rows] = torch.mm(logits, weight)
            add_sparse_part(grad_hidden[rows], weight, gradient_terms)
            if grad_weight is not None or grad_bias is not None:
                set_sparse_part(logits, gradient_terms)
        if grad_weight is not None:
            grad_weight.addmm_(logits.T, chunk, beta=int(start > 0))
        if grad_bias is not None:
            grad_bias += logits.sum(0, dtype=grad_bias.dtype)
    return LogitStatistics.joined(statistics), grad_hidden, grad_weight, grad_bias


def _by_vocabulary_slices(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    needed: tuple[bool, bool, bool],
    grad_total: Tensor,
    statistics: LogitStatistics,
    objective: _LossArguments,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients needed, computed in slices of the vocabulary, for all tokens at once."""
    token_weights, noise = objective.token_weights * grad_total.double(), objective.noise
    gradient_terms = gradient_scalars(statistics, objective.terms, noise, token_weights, hidden)
    grad_hidden = torch.zeros_like(hidden, dtype=work_dtype(hidden)) if needed[0] else None
    grad_weight = torch.empty_like(weight) if needed[1] else None
    grad_bias = torch.empty_like(bias, dtype=work_dtype(bias)) if needed[2] else None
    # An eighth of a chunk's memory, as the gradient of the weight is held too; a multiple of 64 for fast products.
    width = 64 * math.ceil(objective.chunk_size * weight.shape[0] / (8 * 64 * max(1, hidden.shape[0])))
    buffer = hidden.new_empty(min(width, weight.shape[0]) * hidden.shape[0])
    for first in range(0, weight.shape[0], width):
        part = weight[first : first + width]
        logits = buffer[: hidden.shape[0] * part.shape[0]].view(hidden.shape[0], part.shape[0])
        _logits(hidden, part, None if bias is None else bias[first : first + width], logits)
        row_gradients(logits, logits, gradient_terms, noise, first, sparse_part=grad_hidden is None)
        if grad_hidden is not None:
            grad_hidden += torch.mm(logits, part)
            if grad_weight is not None or grad_bias is not None:
                set_sparse_part(logits, gradient_terms, first)
        if grad_weight is not None:
            torch.mm(logits.T, hidden, out=grad_weight[first : first + width])
        if grad_bias is not None:
            grad_bias[first : first + width] = logits.sum(0, dtype=grad_bias.dtype)
    if grad_hidden is not None:
        add_sparse_part(grad_hidden, weight, gradient_terms)
    return grad_hidden, grad_weight, grad_bias


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    return torch.mm(hidden, weight.T, out=out) if bias is None else torch.addmm(bias, hidden, weight.T, out=out)


def _as_autocast_would(x: Tensor) -> Tensor:
    device = x.device.type
    casts = torch.is_autocast_enabled(device) and x.dtype != torch.float64
    return x.to(torch.get_autocast_dtype(device)) if casts else x
