"""Sums over the vocabulary and the closed-form gradient of the losses, in blocks of rows.

`logit_statistics` computes the six numbers per token that the loss needs, `row_gradients` the gradient from the same
logits. Besides logits and gradient, only two scratch buffers have a dimension of size N. Tokens without a loss are
skipped. Computations are float32, or float64 for float64 logits, whatever the model's dtype.

Shapes: N vocabulary, M tokens of one row block.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..categorical import per_device
from ..checks import work_dtype
from ..noise import NoiseDistribution
from ..objective import LogitStatistics, PerToken, TokenTerms, rho, token_state
from .kernels import triton_rows

# Elements of one row block, for each CPU thread: two float32 buffers of that size stay in cache, or fill a GPU.
BLOCK_ELEMENTS = {"cpu": 2**18, "other": 2**26}


def logit_statistics(
    logits: Tensor, terms: TokenTerms, noise: NoiseDistribution, with_gradient: bool
) -> LogitStatistics:
    """Six numbers of each token from its logits (M, N), on a GPU by a Triton kernel."""
    floor, scored = _floor(terms, logits), terms.scale > 0
    kernels = triton_rows(logits, noise.absorbing_ids)
    if kernels is None:
        sums = _row_sums(logits, floor, scored, noise, with_gradient)
    else:
        absorbing = next(iter(noise.absorbing_ids), -1)
        sums = kernels.statistics(logits, floor.float(), scored, absorbing, noise.has_uniform).double().unbind(-1)
    top, total, mean_rho, share = sums
    log_p_0, log_p_z = (_log_p(logits, ids, top + total.log(), noise) for ids in (terms.x_0, terms.z_t))
    return LogitStatistics(top, total, log_p_0, log_p_z.exp(), mean_rho, share)


def _row_sums(
    logits: Tensor, floor: Tensor, scored: Tensor, noise: NoiseDistribution, with_gradient: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """top, total, sum p rho(y), sum p y/(1 + y), (M,) float64: one pass over the tokens that have a loss, a second over
    those near t = 1.

    With exp = exp(logit - top), total its sum and floor = u / alpha: p = exp / total and y = p / floor. As sum p = 1,

        sum p rho(y) = 1 - floor sum log(1 + y),    sum p y/(1 + y) = 1 - floor sum y/(1 + y)

    Where all y are small, these differences cancel; such rows are summed term by term.
    """
    floor_column = floor.to(work_dtype(logits))[:, None]
    sums = torch.ones(logits.shape[0], 4, dtype=floor_column.dtype, device=logits.device)
    for rows, exp, scratch in _row_blocks(logits, scored, noise.absorbing_ids):
        top = exp.amax(-1, keepdim=True)
        total = _exp_from_top(exp, top).sum(-1, keepdim=True)
        logs, shares = total, total
        if noise.has_uniform:
            y = exp.mul_((floor_column[rows] * total).reciprocal_())
            logs, shares = _vocabulary_sums(y, scratch, with_gradient)
        sums[rows] = torch.cat((top, total, logs, shares), -1)
    top, total, logs, shares = sums.double().unbind(-1)
    mean_rho, share = 1 - floor * logs, 1 - floor * shares

    y_is_small = scored & (floor * max(64, logits.shape[-1] / 16) > 1)
    for rows, exp, _ in _row_blocks(logits, y_is_small, noise.absorbing_ids):
        y = _exp_from_top(exp, sums[rows, :1]) / (floor_column[rows] * sums[rows, 1:2])
        mean_rho[rows] = (exp * rho(y)).sum(-1).double() / total[rows]
        share[rows] = (exp * (y / (1 + y))).sum(-1).double() / total[rows]
    return top, total, mean_rho, share


def _vocabulary_sums(y: Tensor, scratch: Tensor, with_gradient: bool) -> tuple[Tensor, Tensor]:
    """sum log(1 + y) and sum y/(1 + y), (M, 1) each, of a block of even width; overwrites both buffers.

    Two tokens share one logarithm, of their product, which stays within float32 because y <= 1e18.
    """
    f, half = torch.add(y, 1.0, out=scratch if with_gradient else y), y.shape[-1] // 2
    shares = y.div_(f).sum(-1, keepdim=True) if with_gradient else y[:, :1]
    logs = f[:, :half].mul_(f[:, half:]).log_().sum(-1, keepdim=True)
    return logs, shares


def _exp_from_top(logits: Tensor, top: Tensor, exact_zero: bool = False) -> Tensor:
    """exp(logits - top) in place; values below 1e-26 become about 1e-26, or 0 with `exact_zero`.

    The sums do not change; float32 denormals would be a hundred times slower on a CPU.
    """
    exp = logits.sub_(top).clamp_min_(-60.0).exp_()
    return torch.threshold_(exp, 1e-26, 0.0) if exact_zero else exp


def _log_p(logits: Tensor, ids: Tensor, log_total: Tensor, noise: NoiseDistribution) -> Tensor:
    log_p = logits.gather(-1, ids[:, None]).squeeze(-1).double() - log_total
    for token_id in noise.absorbing_ids:
        log_p[ids == token_id] = -torch.inf
    return log_p


@dataclass(frozen=True)
class _GradientTerms(PerToken):
    """dloss/dlogit_e = factor exp (exp / (exp + t) - mean), except at z_t and x_0; exp = exp(logit - top)."""

    top: Tensor  # this and the next three: (M, 1) in the working dtype
    t: Tensor
    mean: Tensor
    factor: Tensor
    z_t: Tensor  # this and the rest: (M,)
    x_0: Tensor
    at_z: Tensor  # the gradient at z_t, 0 if that is x_0; float64
    at_0: Tensor
    active: Tensor  # tokens that have a gradient, bool


def row_gradients(
    logits: Tensor,
    out: Tensor,
    terms: _GradientTerms,
    noise: NoiseDistribution,
    first: int = 0,
    sparse_part: bool = True,
) -> None:
    """Write the gradient of the logits (M, n) of tokens [first, first + n) to `out`, which may be `logits` itself.

    Without `sparse_part` its entries at z_t and x_0 are 0.
    """
    absorbing = [i - first for i in noise.absorbing_ids if first <= i < first + logits.shape[-1]]
    kernels = triton_rows(logits, absorbing)
    if kernels is None or out.stride(-1) != 1:
        _dense_part(logits, out, terms, noise, absorbing)
        set_sparse_part(out, terms, first, to_zero=not sparse_part)
        return
    scalars = torch.cat((terms.top, terms.t, terms.mean, terms.factor), -1)
    ids, at_ids = torch.stack((terms.z_t, terms.x_0), -1), torch.stack((terms.at_z, terms.at_0), -1)
    places = {"absorbing": next(iter(absorbing), -1), "first": first}
    kernels.gradients(
        logits, out, scalars, ids, at_ids, terms.active, **places, has_uniform=noise.has_uniform, sparse=sparse_part
    )


def _dense_part(
    logits: Tensor, out: Tensor, terms: _GradientTerms, noise: NoiseDistribution, absorbing: Sequence[int]
) -> None:
    """`row_gradients` as if no entry were special; absorbing tokens are counted from the first column."""
    width = logits.shape[-1]
    if not terms.active.all():
        out[~terms.active] = 0.0
    in_place = out.dtype == work_dtype(out) and bool(terms.active.all())
    for rows, exp, f in _row_blocks(logits, terms.active, absorbing, out if in_place else None):
        _exp_from_top(exp, terms.top[rows], exact_zero=True)
        if noise.has_uniform:
            f = f[:, : exp.shape[-1]]
            torch.div(exp, torch.add(exp, terms.t[rows], out=f), out=f)
            exp.mul_(f.sub_(terms.mean[rows])).mul_(terms.factor[rows])
        else:
            exp.mul_((1 - terms.mean[rows]) * terms.factor[rows])
        if not in_place:
            out[rows] = exp[:, :width] if isinstance(rows, slice) else exp[:, :width].to(out.dtype)


def set_sparse_part(out: Tensor, terms: _GradientTerms, first: int = 0, to_zero: bool = False) -> None:
    """Set the entries at z_t and x_0 of a gradient that `row_gradients` wrote. Does not synchronize with the device."""
    rows = torch.arange(len(out), device=out.device)
    for ids, value in ((terms.z_t, terms.at_z), (terms.x_0, terms.at_0)):
        inside = (ids >= first) & (ids < first + out.shape[-1])
        columns = (ids - first).clamp(0, out.shape[-1] - 1)
        # Not scatter_, which takes as long as a pass over `out` in bfloat16.
        out[rows, columns] = torch.where(inside, 0.0 if to_zero else value.to(out.dtype), out[rows, columns])


def add_sparse_part(grad_hidden: Tensor, weight: Tensor, terms: _GradientTerms) -> None:
    """Add what the entries at z_t and x_0 contribute to the gradient of the hidden states, (M, D), float32 or wider."""
    for ids, value in ((terms.z_t, terms.at_z), (terms.x_0, terms.at_0)):
        grad_hidden.addcmul_(value[:, None].to(grad_hidden.dtype), weight[ids].to(grad_hidden.dtype))


def _floor(terms: TokenTerms, logits: Tensor) -> Tensor:
    """u / alpha, (M,): f(p, e) = alpha (p_e + floor). Kept above 0, so that 0/0 cannot arise."""
    return torch.where(terms.u > 0, terms.u / terms.alpha, 0.0).clamp_min(
        1e-100 if logits.dtype == torch.float64 else 1e-18
    )


def _row_blocks(
    logits: Tensor, active: Tensor, absorbing: Sequence[int], out: Tensor | None = None
) -> Iterator[tuple[slice | Tensor, Tensor, Tensor]]:
    """Yield (rows, block, scratch): the active rows, some at a time, as slice or indices, and two buffers.

    `block` is a float32-or-wider copy of those rows with -inf in absorbing columns and in the one that makes the width
    even; or these very rows of `out`, if given: then all must be active.
    """
    index = None if active.all() else active.nonzero().squeeze(-1)
    count, width = logits.shape[0] if index is None else len(index), logits.shape[-1]
    threads = torch.get_num_threads() if logits.device.type == "cpu" else 1
    size = max(1, min(count, threads * per_device(BLOCK_ELEMENTS, logits.device) // width))
    buffers = torch.empty(2, size, width + width % 2, dtype=work_dtype(logits), device=logits.device)
    for start in range(0, count, size):
        stop = min(start + size, count)
        rows = slice(start, stop) if index is None else index[start:stop]
        block, scratch = buffers[:, : stop - start]
        block = block if out is None else out[rows]
        if out is not logits:
            block[:, :width] = logits[rows]
        for column in (*absorbing, *range(width, block.shape[-1])):
            block[:, column] = -torch.inf
        yield rows, block, scratch


def gradient_scalars(
    statistics: LogitStatistics, terms: TokenTerms, noise: NoiseDistribution, token_weights: Tensor, logits: Tensor
) -> _GradientTerms:
    """Terms per token of the gradient of sum(token_weights * loss) with respect to the logits.

        dloss/dp_e     = scale { y_e/(1 + y_e) + [e = z] S_z + [e = x_0] S_0 },  y_e = alpha p_e / u
        dloss/dlogit_e = p_e (dloss/dp_e - sum_j p_j dloss/dp_j)

    up to a constant in the first line, which the second removes. S_0 = -alpha/f(p, x_0), and S_z is dT/dp_z of
    T = w [rho(alpha w) - rho(B alpha w)]. At z and x_0 the second line is computed in float64.
    """
    state, floor = token_state(statistics, terms), _floor(terms, logits)
    s_z = -terms.alpha * state.w * terms.stay / (terms.stay * state.f_p_z + terms.step)
    p_s_z = torch.where(statistics.p_z > 0, statistics.p_z * s_z, 0.0)
    # alpha p_0 / f(p, x_0) tends to 1, not 0/0, where u_0 = 0 and p_0 underflows.
    u_0, p_0 = terms.b_0, state.log_p_0.exp()
    p_s_0 = -torch.where(u_0 > 0, terms.alpha * p_0 / torch.where(u_0 > 0, state.f_p_0, 1.0), 1.0)
    mean = statistics.share + p_s_z + p_s_0

    same = terms.z_t == terms.x_0
    at_z = statistics.p_z * (statistics.p_z / (statistics.p_z + floor) - mean) + p_s_z
    at_0 = p_0 * (p_0 / (p_0 + floor) - mean) + p_s_0 + torch.where(same, p_s_z, 0.0)
    weight = torch.where(terms.scale > 0, terms.scale * token_weights, 0.0)
    active = weight != 0
    columns = (statistics.top, floor * statistics.total, mean, weight / statistics.total)
    columns = (column.to(work_dtype(logits))[:, None] for column in columns)
    at_z, at_0 = torch.where(active & ~same, weight * at_z, 0.0), torch.where(active, weight * at_0, 0.0)
    return _GradientTerms(*columns, terms.z_t, terms.x_0, at_z, at_0, active)
