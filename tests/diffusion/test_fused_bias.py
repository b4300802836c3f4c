"""The fused loss of an output layer with a bias: logits = h W^T + b, against plain autograd."""

import itertools
import sys
from pathlib import Path

import pytest
import torch

from xdlm_hf import GIDDProcess, NoiseKernel, diffusion_loss, fused_linear_diffusion_loss
from xdlm_hf.diffusion.ops import rows as row_passes

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
from measure import peak_bytes  # noqa: E402

F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16
N, D = 37, 6
RATIOS = (0.0, 1e-3, 0.1, 1.0)


def draw(k, dtype=F64, rows=4, length=5):
    """Hidden states, weight, bias, token weights and the loss' other arguments; the mask row has no small bias."""
    generator = torch.Generator().manual_seed(7)
    kernel = NoiseKernel(N, k, N - 1)
    x_0 = torch.randint(N - 1, (rows, length), generator=generator)
    alpha_t = torch.tensor([0.95, 0.6, 0.3, 0.02], dtype=F64)[:rows]
    z_t = kernel.corrupt(x_0, alpha_t, generator)
    hidden, weight, bias = (
        torch.randn(*shape, dtype=F64, generator=generator).to(dtype) for shape in ((rows, length, D), (N, D), (N,))
    )
    token_weights = torch.rand(rows, length, dtype=F64, generator=generator)
    token_weights[1, 2:] = 0.0
    return (hidden, weight, bias), token_weights, (x_0, z_t, alpha_t, -torch.ones(rows, dtype=F64), kernel)


def total_and_gradients(inputs, token_weights, args, fused, wanted=(0, 1, 2), **options):
    leaves = [x.detach().clone() for x in inputs]
    for i in wanted:
        leaves[i].requires_grad_()
    hidden, weight, bias = leaves
    if fused:
        total, _ = fused_linear_diffusion_loss(hidden, weight, *args, token_weights=token_weights, bias=bias, **options)
    else:
        total = (token_weights * diffusion_loss(torch.nn.functional.linear(hidden, weight, bias), *args)).sum()
    return [total.detach(), *torch.autograd.grad(-3 * total, [leaves[i] for i in wanted])]


@pytest.mark.parametrize("chunk_size", [1, 7, 1000])
@pytest.mark.parametrize("k", RATIOS)
def test_fused_equals_plain(k, chunk_size):
    setting = draw(k)
    ours = total_and_gradients(*setting, fused=True, chunk_size=chunk_size)
    for a, b in zip(ours, total_and_gradients(*setting, fused=False), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("wanted", [w for n in (1, 2) for w in itertools.combinations(range(3), n)])
def test_any_part_may_be_frozen(wanted):
    for dtype in (F64, BF16, torch.float16):
        setting = draw(0.1, dtype)
        ours = total_and_gradients(*setting, fused=True, wanted=wanted, chunk_size=6)
        plain = total_and_gradients(*setting, fused=False, wanted=wanted)
        for a, b in zip(ours, plain, strict=True):
            bound = {"rtol": 1e-10, "atol": 1e-13} if dtype == F64 else {"rtol": 0, "atol": 0.05 * b.abs().max()}
            torch.testing.assert_close(a.double(), b.double(), **bound)
        assert all(gradient.dtype == dtype for gradient in ours[1:])


@pytest.mark.parametrize("k", RATIOS)
def test_gradcheck(k):
    inputs, token_weights, args = draw(k, rows=2, length=2)
    inputs = [x.requires_grad_() for x in inputs]

    def total(hidden, weight, bias):
        options = {"token_weights": token_weights[:2, :2], "chunk_size": 3}
        return fused_linear_diffusion_loss(hidden, weight, *args, bias=bias, **options)[0]

    assert torch.autograd.gradcheck(total, inputs)


def test_a_bias_is_a_column_of_ones():
    (hidden, weight, bias), token_weights, args = draw(0.1)
    wide = torch.cat([hidden, torch.ones(4, 5, 1, dtype=F64)], -1), torch.cat([weight, bias[:, None]], -1)
    wide = [x.requires_grad_() for x in wide]
    total, per_token = fused_linear_diffusion_loss(*wide, *args, token_weights=token_weights)
    grad_wide = torch.autograd.grad(-3 * total, wide[1])[0]
    ours = total_and_gradients((hidden, weight, bias), token_weights, args, fused=True)
    torch.testing.assert_close(ours[0], total.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(ours[2], grad_wide[:, :-1], rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(ours[3], grad_wide[:, -1], rtol=1e-10, atol=1e-13)
    _, ours = fused_linear_diffusion_loss(hidden, weight, *args, bias=bias)
    torch.testing.assert_close(ours, per_token, rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("k", RATIOS)
def test_in_low_precision_as_good_as_plain(k, dtype):
    """Against float64 on the same rounded numbers: no worse than twice plain autograd, and rounding of the result."""
    inputs, *rest = draw(k, dtype)
    exact = total_and_gradients([x.double() for x in inputs], *rest, fused=False)
    ours, plain = (total_and_gradients(inputs, *rest, fused=fused) for fused in (True, False))
    for a, b, c in zip(ours, plain, exact, strict=True):
        assert (a - c).norm() <= 2 * (b - c).norm() + torch.finfo(dtype).eps * c.norm()


def test_the_gradient_of_the_bias_is_summed_in_float32():
    """2000 tokens, one of them a chunk: a bfloat16 sum would stop growing after a few hundred."""
    ids = torch.full((1, 2000), 3), torch.zeros(1, 2000, dtype=torch.long)
    rates, kernel = (torch.tensor([0.5]), torch.tensor([-1.0])), NoiseKernel(N, 0.1, 0)
    gradients = []
    for frozen in (True, False):
        hidden, weight = torch.ones(1, 2000, 2, dtype=BF16), torch.zeros(N, 2, dtype=BF16, requires_grad=not frozen)
        bias = torch.zeros(N, dtype=BF16, requires_grad=True)
        total, _ = fused_linear_diffusion_loss(hidden, weight, *ids, *rates, kernel, chunk_size=1, bias=bias)
        gradients.append(torch.autograd.grad(total, bias)[0])
    bias = torch.zeros(N, dtype=F64, requires_grad=True)
    plain = diffusion_loss(bias.expand(1, 2000, N), *ids, *rates, kernel).sum()
    (expected,) = torch.autograd.grad(plain, bias)
    for gradient in gradients:
        torch.testing.assert_close(gradient.double(), expected, rtol=1e-2, atol=1e-6)


def test_under_autocast():
    inputs, token_weights, args = draw(0.1, F32)
    with torch.autocast("cpu", dtype=BF16):
        ours, plain = (total_and_gradients(inputs, token_weights, args, fused=fused) for fused in (True, False))
    for a, b in zip(ours, plain, strict=True):
        assert a.dtype == F32 and (a - b).norm() <= 2e-2 * b.norm()


def test_with_noise_that_changes_with_time():
    (hidden, weight, bias), token_weights, (x_0, *_) = draw(0.1)
    process, t = GIDDProcess(N, N - 1, 0.2), torch.tensor([0.1, 0.4, 0.7, 0.95], dtype=F64)
    z_t = process.corrupt(x_0, t, torch.Generator().manual_seed(0))
    total, per_token = process.fused_loss(hidden, weight, x_0, z_t, t, token_weights, chunk_size=3, bias=bias)
    plain = process.loss(hidden @ weight.T + bias, x_0, z_t, t)
    torch.testing.assert_close(per_token, plain, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(total, (token_weights * plain).sum(), rtol=1e-12, atol=0)


def test_a_bias_that_does_not_fit_is_refused():
    (hidden, weight, bias), _, args = draw(0.1)
    with pytest.raises(ValueError, match=r"bias of shape \(36,\) must be \(N,\) = \(37,\)"):
        fused_linear_diffusion_loss(hidden, weight, *args, bias=bias[1:])
    with pytest.raises(ValueError, match="hidden is torch.float64 and bias torch.float32: cast one"):
        fused_linear_diffusion_loss(hidden, weight, *args, bias=bias.float())


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_no_more_memory_than_without_a_bias(dtype, monkeypatch):
    """512 tokens, 4,096 rows, chunks of 32: the logits are never whole, and a bias adds vectors of N numbers alone."""
    monkeypatch.setattr(row_passes, "BLOCK_ELEMENTS", {"cpu": 2**13, "other": 2**13})
    rows, generator = 4096, torch.Generator().manual_seed(0)
    x_0, z_t = (torch.randint(rows - 1, (4, 128), generator=generator) for _ in range(2))
    args = x_0, z_t, torch.full((4,), 0.5), -torch.ones(4), NoiseKernel(rows, 0.1, rows - 1)
    hidden, weight, bias = (
        torch.randn(*shape).to(dtype).requires_grad_() for shape in ((4, 128, 64), (rows, 64), (rows,))
    )

    def peak(bias):
        wanted = [x for x in (hidden, weight, bias) if x is not None]
        return peak_bytes(
            lambda: torch.autograd.grad(
                fused_linear_diffusion_loss(hidden, weight, *args, chunk_size=32, bias=bias)[0], wanted
            )
        )

    with_bias, without = peak(bias), peak(None)
    assert with_bias < without + 4 * 4 * rows
    assert with_bias < 512 * rows * dtype.itemsize / 2 + 2 * weight.nbytes
