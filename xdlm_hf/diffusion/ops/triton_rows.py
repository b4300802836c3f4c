"""Passes over rows of logits as Triton kernels, for a GPU: twins of `rows`, of the confidence and the ancestral step.

One program reads one row; what it reads again comes from the L2 cache, where a row of 126,464 bfloat16 logits (253 KB)
fits. Loads are converted to float32 at once; nothing but the gradient is stored in the logits' dtype.

    statistics     top, total, sum p rho(y), sum p y/(1 + y), as `rows.logit_statistics`, but summed term by term
    gradients      the closed-form gradient, in place or not, with its entries at z_t and x_0, as `rows.row_gradients`
    confidences    argmax, and the probabilities of the argmax and of the current token, in one read
    draw           the token at a quantile of softmax(logits), by cumulative sums of blocks, then within one block

With TRITON_INTERPRET=1 in the environment before the first import they run on a CPU, slowly, which the tests use.

Shapes: M rows, N vocabulary.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096  # columns that a program holds at a time
WARPS = 8


@triton.jit
def _log1p(y):
    """log(1 + y) by Kahan's form: the rounding of 1 + y cancels in y / ((1 + y) - 1)."""
    above = 1.0 + y
    added = above - 1.0
    return tl.where(added == 0.0, y, tl.log(above) * (y / tl.where(added == 0.0, 1.0, added)))


@triton.jit
def _rho(y):
    """rho(y) = 1 - log(1 + y)/y; below 1e-2 the first terms of its series, whose rest is under 1e-9 of them."""
    series = y * (1 / 2 - y * (1 / 3 - y * (1 / 4 - y * (1 / 5 - y / 6))))
    return tl.where(y < 1e-2, series, 1.0 - _log1p(y) / tl.where(y < 1e-2, 1.0, y))


@triton.jit
def _row(base, first, columns, n, absorbing):
    """Columns [first, first + BLOCK) of a row as float32, -inf beyond its end and at the absorbing token."""
    e = first + columns
    x = tl.load(base + e, mask=e < n, other=float("-inf")).to(tl.float32)
    return tl.where(e == absorbing, float("-inf"), x)


@triton.jit
def _top_and_total(base, n, absorbing, BLOCK: tl.constexpr):
    """The row's largest logit and the sum of exp(logit - largest), each lane's own first."""
    columns = tl.arange(0, BLOCK)
    top = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(0, n, BLOCK):
        x = _row(base, first, columns, n, absorbing)
        higher = tl.maximum(top, x)
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp(top - shift) + tl.exp(x - shift)
        top = higher
    row_top = tl.max(top, 0)
    return row_top, tl.sum(total * tl.exp(top - row_top), 0)


@triton.jit
def _statistics_kernel(
    logits, stride, n, absorbing, floor, scored, out, HAS_UNIFORM: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    if tl.load(scored + row) == 0:
        return
    base, columns = logits + row * stride, tl.arange(0, BLOCK)
    top, total = _top_and_total(base, n, absorbing, BLOCK)
    tl.store(out + 4 * row, top)
    tl.store(out + 4 * row + 1, total)
    if HAS_UNIFORM:
        row_floor = tl.load(floor + row)
        # Half a block at a time: 64 registers a thread instead of 128 and, with Triton 3.6, spills.
        columns = tl.arange(0, BLOCK // 2)
        rhos, shares = tl.zeros([BLOCK // 2], tl.float32), tl.zeros([BLOCK // 2], tl.float32)
        for first in range(0, n, BLOCK // 2):
            p = tl.exp(_row(base, first, columns, n, absorbing) - top) / total
            y = p / row_floor
            rhos += p * _rho(y)
            shares += p * (y / (1.0 + y))
        tl.store(out + 4 * row + 2, tl.sum(rhos, 0))
        tl.store(out + 4 * row + 3, tl.sum(shares, 0))


@triton.jit
def _gradients_kernel(
    logits,
    out,
    logits_stride,
    out_stride,
    n,
    absorbing,
    first_id,
    scalars,
    ids,
    at_ids,
    active,
    HAS_UNIFORM: tl.constexpr,
    SPARSE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, e = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = e < n
    x = tl.load(logits + row * logits_stride + e, mask=inside, other=float("-inf")).to(tl.float32)
    top, t = tl.load(scalars + 4 * row), tl.load(scalars + 4 * row + 1)
    mean, factor = tl.load(scalars + 4 * row + 2), tl.load(scalars + 4 * row + 3)
    exp = tl.where(e == absorbing, 0.0, tl.exp(x - top))
    gradient = exp * ((exp / (exp + t) if HAS_UNIFORM else 1.0) - mean) * factor
    # Before z_t and x_0, so that x_0 wins where both are one token.
    z_t, x_0 = tl.load(ids + 2 * row) - first_id, tl.load(ids + 2 * row + 1) - first_id
    at_z, at_0 = tl.load(at_ids + 2 * row).to(tl.float32), tl.load(at_ids + 2 * row + 1).to(tl.float32)
    gradient = tl.where(e == z_t, at_z if SPARSE else 0.0, gradient)
    gradient = tl.where(e == x_0, at_0 if SPARSE else 0.0, gradient)
    gradient = tl.where(tl.load(active + row) == 0, 0.0, gradient)
    tl.store(out + row * out_stride + e, gradient.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _confidences_kernel(logits, stride, n, absorbing, ids, predicted, confidences, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    base, columns = logits + row * stride, tl.arange(0, BLOCK)
    top = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    at = columns
    for first in range(0, n, BLOCK):
        x = _row(base, first, columns, n, absorbing)
        at = tl.where(x > top, first + columns, at)
        higher = tl.maximum(top, x)
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp(top - shift) + tl.exp(x - shift)
        top = higher
    row_top = tl.max(top, 0)
    row_total = tl.sum(total * tl.exp(top - row_top), 0)  # NaN if a logit is, or if all are -inf
    tl.store(predicted + row, tl.min(tl.where(top == row_top, at, n - 1), 0).to(tl.int64))  # the first of equals
    current = tl.load(ids + row)
    own = tl.load(base + current).to(tl.float32)
    own = tl.where(current == absorbing, float("-inf"), own)
    tl.store(confidences + 2 * row, 1.0 / row_total)
    tl.store(confidences + 2 * row + 1, tl.exp(own - row_top) / row_total)


@triton.jit
def _draw_kernel(logits, stride, n, absorbing, ids, u, drawn, p_ids, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    base, columns = logits + row * stride, tl.arange(0, BLOCK)
    top, total = _top_and_total(base, n, absorbing, BLOCK)
    current = tl.load(ids + row)
    own = tl.load(base + current).to(tl.float32)
    own = tl.where(current == absorbing, float("-inf"), own)
    tl.store(p_ids + row, tl.exp(own - top) / total)

    # The block in which the cumulative weight passes u of the total, in float64.
    whole = tl.zeros([1], tl.float64)
    for first in range(0, n, BLOCK):
        whole += tl.sum(tl.exp(_row(base, first, columns, n, absorbing) - top).to(tl.float64), 0)
    target = tl.load(u + row) * whole
    before, start, sum_so_far = tl.zeros([1], tl.float64), tl.zeros([1], tl.int64), tl.zeros([1], tl.float64)
    for first in range(0, n, BLOCK):
        weight = tl.sum(tl.exp(_row(base, first, columns, n, absorbing) - top).to(tl.float64), 0)
        # The last block with weight that begins at or below the target: with rounding there is always one.
        chosen = tl.where(weight > 0, sum_so_far, float("inf")) <= target
        start, before = tl.where(chosen, first, start), tl.where(chosen, sum_so_far, before)
        sum_so_far += weight
    # Within it: the tokens whose cumulative weight does not pass the target are skipped.
    e = start + columns
    x = tl.load(base + e, mask=e < n, other=float("-inf")).to(tl.float32)
    weights = tl.exp(tl.where(e == absorbing, float("-inf"), x) - top).to(tl.float64)
    skipped = tl.sum((before + tl.cumsum(weights, 0) <= target).to(tl.int64), 0)
    last = tl.max(tl.where(weights > 0, columns, 0), 0)  # after rounding: never a token of weight 0
    tl.store(drawn + row + tl.arange(0, 1), start + tl.minimum(skipped, last))


def statistics(logits: Tensor, floor: Tensor, scored: Tensor, absorbing: int, has_uniform: bool) -> Tensor:
    """(M, 4) float32: top, total, sum p rho(p / floor), sum p y/(1 + y); ones for rows that are not scored.

    Args:
        logits: (M, N) float32 or narrower, rows contiguous.
        floor: (M,) float32, positive.
        scored: (M,) bool.
        absorbing: Token without probability, or -1.
        has_uniform: Whether the last two are wanted; else they are ones.
    """
    out = torch.ones(logits.shape[0], 4, dtype=torch.float32, device=logits.device)
    arguments = (logits, logits.stride(0), logits.shape[1], absorbing, floor, scored, out)
    if len(logits):
        _statistics_kernel[(len(logits),)](*arguments, HAS_UNIFORM=has_uniform, BLOCK=BLOCK, num_warps=WARPS)
    return out


def gradients(
    logits: Tensor,
    out: Tensor,
    scalars: Tensor,
    ids: Tensor,
    at_ids: Tensor,
    active: Tensor,
    absorbing: int,
    first: int,
    has_uniform: bool,
    sparse: bool,
) -> None:
    """Write the gradient of the logits (M, n) of tokens [first, first + n) to `out`, which may be `logits` itself.

    Args:
        scalars: (M, 4) float32: top, t, mean and factor of `rows`.
        ids: (M, 2) int64, z_t and x_0.
        at_ids: (M, 2) float64, the gradient at these; 0 is written there unless `sparse`.
        active: (M,) bool; other rows become 0.
        absorbing: Token without probability, counted from `first`, or -1.
    """
    grid = (logits.shape[0], triton.cdiv(logits.shape[1], BLOCK))
    if logits.numel():
        _gradients_kernel[grid](
            logits, out, logits.stride(0), out.stride(0), logits.shape[1], absorbing, first, scalars, ids, at_ids,
            active, HAS_UNIFORM=has_uniform, SPARSE=sparse, BLOCK=BLOCK, num_warps=WARPS,
        )  # fmt: skip


def confidences(logits: Tensor, ids: Tensor, absorbing: int) -> tuple[Tensor, Tensor]:
    """Argmax (M,) int64, and (M, 2) float32: the probabilities of the argmax and of the tokens `ids` (M,)."""
    predicted = torch.empty(len(ids), dtype=torch.int64, device=ids.device)
    found = torch.empty(len(ids), 2, dtype=torch.float32, device=ids.device)
    arguments = (logits, logits.stride(0), logits.shape[1], absorbing, ids, predicted, found)
    if len(ids):
        _confidences_kernel[(len(ids),)](*arguments, BLOCK=BLOCK, num_warps=WARPS)
    return predicted, found


def draw(logits: Tensor, ids: Tensor, u: Tensor, absorbing: int) -> tuple[Tensor, Tensor]:
    """Tokens (M,) at the quantiles u (M,), float64, of softmax(logits), and the probabilities (M,) of the tokens `ids`.

    As the twin, never a token of weight 0; the token is arbitrary where the probability is NaN.
    """
    drawn = torch.empty(len(ids), dtype=torch.int64, device=ids.device)
    p_ids = torch.empty(len(ids), dtype=torch.float32, device=ids.device)
    arguments = (logits, logits.stride(0), logits.shape[1], absorbing, ids, u, drawn, p_ids)
    if len(ids):
        _draw_kernel[(len(ids),)](*arguments, BLOCK=BLOCK, num_warps=WARPS)
    return drawn, p_ids
