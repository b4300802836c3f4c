"""The Triton kernels against the plain passes in float64: interpreted on a CPU, compiled on a GPU.

tests/conftest.py sets TRITON_INTERPRET where there is no GPU. The interpreter truncates where a GPU rounds to bfloat16,
so a bfloat16 gradient may differ by one unit in the last place.
"""

import os
import re
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")

from xdlm_hf import NoiseKernel  # noqa: E402
from xdlm_hf.diffusion import reverse  # noqa: E402
from xdlm_hf.diffusion.objective import limit_terms, token_losses  # noqa: E402
from xdlm_hf.diffusion.ops import fused, kernels, rows, triton_rows  # noqa: E402
from xdlm_hf.generation.confidence import ConfidenceSampler, ConfidenceSettings  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
N, M = 5003, 6  # two blocks of columns, the second one not full
NARROW = [torch.float32, torch.bfloat16, torch.float16]
ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}


@pytest.fixture
def on_triton(monkeypatch):
    """The kernels where their plain twins would run."""
    monkeypatch.setattr(kernels, "_runs_on", lambda device: True)


def case(k, dtype, n=N, spread=3.0):
    """Logits (M, N) and terms: [MASK], the clean token and noise at z_t; a sure prediction; t from 0.1 to 1."""
    kernel = NoiseKernel(n, k, n - 1)
    generator = torch.Generator().manual_seed(0)
    logits = (spread * torch.randn(M, n, generator=generator)).to(dtype)
    x_0 = torch.randint(n - 1, (M, 1), generator=generator)
    alpha = torch.tensor([0.9, 0.6, 0.3, 0.1, 1e-3, 1e-6])
    z_t = kernel.corrupt(x_0, alpha, generator)
    z_t[1], z_t[2] = n - 1 if k < 1 else 7, x_0[2]
    logits[3, x_0[3]] = 30.0  # a sure prediction
    terms = limit_terms(x_0.to(DEVICE), z_t.to(DEVICE), alpha.to(DEVICE), -torch.ones(M, device=DEVICE), kernel)
    return logits.to(DEVICE), terms, kernel


def gradient(logits, terms, kernel, statistics, **options):
    weights = torch.linspace(0.5, 2, M, dtype=torch.float64, device=logits.device)
    scalars = rows.gradient_scalars(statistics, terms, kernel, weights, logits)
    out = torch.empty_like(logits)
    rows.row_gradients(logits, out, scalars, kernel, **options)
    return out


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("k", [0.0, 0.1, 1.0])
def test_statistics_and_losses(k, dtype, on_triton):
    logits, terms, kernel = case(k, dtype)
    exact = rows.logit_statistics(logits.double(), terms, kernel, True)
    found = rows.logit_statistics(logits, terms, kernel, True)
    scored = terms.scale > 0
    for name in ("top", "total", "log_p_0", "p_z", "rho", "share"):
        ours, theirs = (getattr(x, name)[scored] for x in (found, exact))
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=2e-7, msg=lambda m, name=name: f"{name}: {m}")
    torch.testing.assert_close(token_losses(found, terms), token_losses(exact, terms), rtol=1e-5, atol=1e-6)


def test_statistics_over_lladas_vocabulary(on_triton):
    """31 blocks of columns: the sums do not lose digits with their number."""
    logits, terms, kernel = case(0.1, torch.bfloat16, n=126464)
    exact = rows.logit_statistics(logits.double(), terms, kernel, True)
    found = rows.logit_statistics(logits, terms, kernel, True)
    for name in ("total", "rho", "share"):
        torch.testing.assert_close(getattr(found, name), getattr(exact, name), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("k", [0.0, 0.1, 1.0])
def test_gradients(k, dtype, in_place, on_triton):
    logits, terms, kernel = case(k, dtype)
    statistics = rows.logit_statistics(logits.double(), terms, kernel, True)
    exact = gradient(logits.double(), terms, kernel, statistics)
    wide = rows.gradient_scalars(statistics, terms, kernel, torch.linspace(0.5, 2, M).double().to(DEVICE), logits)
    out = logits.clone() if in_place else torch.empty_like(logits)
    rows.row_gradients(out if in_place else logits, out, wide, kernel)
    assert (out.double() - exact).abs().max() <= ROUNDING[dtype] * exact.abs().max()
    assert (out.double() - exact).norm() <= ROUNDING[dtype] * exact.norm()
    if k < 1:
        assert (out[:, kernel.mask_token_id] == 0).all()
    assert (out[terms.scale == 0] == 0).all()


def test_a_slice_of_the_vocabulary_without_its_sparse_part(on_triton):
    logits, terms, kernel = case(0.1, torch.float32)
    statistics = rows.logit_statistics(logits.double(), terms, kernel, True)
    whole = gradient(logits, terms, kernel, statistics, sparse_part=False)
    for ids in (terms.z_t, terms.x_0):
        assert (whole[torch.arange(M), ids] == 0).all()
    scalars = rows.gradient_scalars(statistics, terms, kernel, torch.linspace(0.5, 2, M).double().to(DEVICE), logits)
    parts = [torch.empty_like(logits[:, first : first + 700]) for first in range(0, N, 700)]
    for number, part in enumerate(parts):
        first = 700 * number
        inputs = logits[:, first : first + 700].contiguous()
        rows.row_gradients(inputs, part, scalars, kernel, first, sparse_part=False)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_fused_loss(dtype, on_triton, monkeypatch):
    """Total and gradients of hidden states, weight and bias beside the plain passes in float64."""
    generator = torch.Generator().manual_seed(1)
    kernel = NoiseKernel(300, 0.1, 299)
    x_0 = torch.randint(299, (2, 8), generator=generator)
    alpha = torch.tensor([0.7, 0.2])
    z_t = kernel.corrupt(x_0, alpha, generator)
    leaves = [torch.randn(shape, generator=generator).to(dtype) for shape in ((2, 8, 16), (300, 16), (300,))]
    ids = [x.to(DEVICE) for x in (x_0, z_t, alpha, -torch.ones(2))]

    def run(dtype):
        hidden, weight, bias = (x.to(DEVICE, dtype).requires_grad_() for x in leaves)
        total, losses = fused.fused_linear_diffusion_loss(hidden, weight, *ids, kernel, chunk_size=5, bias=bias)
        return [total, losses, *torch.autograd.grad(total, (hidden, weight, bias))]

    for ours, exact in zip(run(dtype), run(torch.float64), strict=True):
        assert (ours.double() - exact).norm() <= 8 * ROUNDING[dtype] * exact.norm()


@pytest.mark.parametrize("dtype", NARROW)
def test_confidences(dtype, on_triton, monkeypatch):
    logits, _, _ = case(0.1, dtype)
    logits[0, 40] = logits[0, 4990] = logits[0, 4500] = 25.0  # equals in both blocks
    logits[1, N - 1] = 60.0  # [MASK], never predicted
    ids = torch.tensor([[4500, N - 1, 3], [4, 5, 6]], device=DEVICE)
    sampler = ConfidenceSampler(ConfidenceSettings(N - 1, 0.1, 1), 0, 3)
    found = sampler.predict(logits.view(2, 3, N), ids)
    monkeypatch.setattr(kernels, "_runs_on", lambda device: False)
    exact = sampler.predict(logits.view(2, 3, N).double(), ids)
    assert found[0].equal(exact[0]) and found[0][0, 0] == 40
    for ours, theirs in zip(found[1:], exact[1:], strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), None])
def test_undefined_rows_are_seen(value, on_triton):
    """A NaN or infinite logit, or none that is finite: NaN, as the plain pass gives it."""
    logits = torch.randn(2, 50, device=DEVICE)
    logits[0] = logits[0] if value is None else logits[0].index_fill(0, torch.tensor(3, device=DEVICE), value)
    logits[0] = -torch.inf if value is None else logits[0]
    ids = torch.tensor([1, 2], device=DEVICE)
    _, found = triton_rows.confidences(logits, ids, 49)
    assert found[0].isnan().all() and found[1].isfinite().all()
    _, p = triton_rows.draw(logits, ids, torch.tensor([0.5, 0.5], dtype=torch.float64, device=DEVICE), 49)
    assert p[0].isnan() and p[1].isfinite()


@pytest.mark.parametrize("dtype", NARROW)
def test_draws_are_at_their_quantiles(dtype):
    """u lies in the drawn token's part of the cumulative distribution, up to float32's rounding of the weights."""
    logits = (3 * torch.randn(M, N)).to(dtype)
    logits[0] = -torch.inf
    logits[0, [5, 4600]] = 0.0  # two tokens in two blocks
    u = torch.tensor([0.5 + 1e-9, 0.0, 1 - 2**-53, 0.25, 0.999, 1e-6], dtype=torch.float64)
    ids = torch.full((M,), 5)
    drawn, p = (x.cpu() for x in triton_rows.draw(*(x.to(DEVICE) for x in (logits, ids, u)), N - 1))
    masked = logits.double()
    masked[:, N - 1] = -torch.inf
    exact = masked.softmax(-1)
    own = exact.gather(-1, drawn[:, None]).squeeze(-1)
    end = exact.cumsum(-1).gather(-1, drawn[:, None]).squeeze(-1)
    assert (own > 0).all() and drawn[0] == 4600
    assert ((end - own - 1e-6 <= u) & (u <= end + 1e-6)).all()
    torch.testing.assert_close(p.double(), exact[:, 5], rtol=1e-6, atol=1e-12)


def test_an_ancestral_step(on_triton, monkeypatch):
    """The same tokens as the plain draw from the same seed."""
    kernel = NoiseKernel(N, 0.3, N - 1)
    z_t = kernel.sample_prior((2, 20), torch.Generator().manual_seed(3)).to(DEVICE)
    logits = (3 * torch.randn(2, 20, N)).to(DEVICE)
    alpha_s, alpha_t = (torch.full((2,), a, device=DEVICE) for a in (0.8, 0.1))

    def draw(generator_seed):
        generator = torch.Generator().manual_seed(generator_seed)
        return reverse.sample_posterior(logits, z_t, alpha_s, alpha_t, kernel, generator)

    on_kernels = draw(5)
    monkeypatch.setattr(kernels, "_runs_on", lambda device: False)
    assert on_kernels.equal(draw(5))


def test_float64_several_special_tokens_and_columns_apart_are_not_for_the_kernels(on_triton, monkeypatch):
    logits = torch.randn(2, 8)
    assert kernels.triton_rows(logits, [7]) is triton_rows
    assert kernels.triton_rows(logits.double(), [7]) is None
    assert kernels.triton_rows(logits, [6, 7]) is None
    assert kernels.triton_rows(logits.T, [1]) is None
    kernels._module.cache_clear()
    monkeypatch.setenv("XDLM_TRITON", "0")
    assert kernels.triton_rows(logits, [7]) is None
    kernels._module.cache_clear()


# Compiles every kernel for an H100 or H200 and prints what the assembler says; compiling needs no GPU.
COMPILE = """
import os, subprocess, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource
from xdlm_hf.diffusion.ops import triton_rows as k

integers = dict.fromkeys(("stride", "logits_stride", "out_stride", "n", "absorbing", "first_id"), "i32")
pointers = {"logits": "*bf16", "ids": "*i64", "scored": "*i1", "active": "*i1", "predicted": "*i64", "drawn": "*i64"}
pointers |= dict.fromkeys(("floor", "scalars", "confidences", "p_ids"), "*fp32") | {"u": "*fp64", "at_ids": "*fp64"}
constants = {"HAS_UNIFORM": True, "SPARSE": True, "BLOCK": k.BLOCK}
assembler = get_ptxas(90).path
for name in ("_statistics_kernel", "_gradients_kernel", "_confidences_kernel", "_draw_kernel"):
    kernel = getattr(k, name)
    types = {**integers, **pointers, "out": "*bf16" if name == "_gradients_kernel" else "*fp32"}
    signature = {a: "constexpr" if a in constants else types[a] for a in kernel.arg_names}
    fixed = {(i,): constants[a] for i, a in enumerate(kernel.arg_names) if a in constants}
    options = {"num_warps": k.WARPS}
    compiled = triton.compile(ASTSource(kernel, signature, fixed), GPUTarget("cuda", 90, 32), options)
    path = os.path.join(sys.argv[1], name + ".ptx")
    open(path, "w").write(compiled.asm["ptx"])
    command = [assembler, "-v", "-arch=sm_90a", path, "-o", os.devnull]
    print(name, subprocess.run(command, capture_output=True, text=True, check=True).stderr.replace(chr(10), " "))
"""


def test_no_kernel_spills_registers(tmp_path):
    finished = subprocess.run(
        [sys.executable, "-c", COMPILE, str(tmp_path)],
        env={**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    lines = finished.stdout.strip().splitlines()
    assert len(lines) == 4
    for line in lines:
        assert "0 bytes spill stores, 0 bytes spill loads" in line, line
        assert int(re.search(r"Used (\d+) registers", line)[1]) <= 128, line  # two programs of 256 threads a processor
