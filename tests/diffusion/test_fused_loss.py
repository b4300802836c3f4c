"""Memory, dtypes and surroundings of the losses: chunks, slices, autocast, checkpointing, compile, ZeRO-3.

What the losses compute is tested in test_losses.py, where every formula meets its oracle.
"""

import sys
from pathlib import Path

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from xdlm_hf import NoiseKernel, diffusion_loss, fused_linear_diffusion_loss, kl_divergence
from xdlm_hf.diffusion.objective import limit_terms
from xdlm_hf.diffusion.ops import fused as fused_module
from xdlm_hf.diffusion.ops import rows as row_passes

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))
from loss import dense_loss  # noqa: E402
from measure import peak_bytes  # noqa: E402

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
ALPHAS = (0.95, 0.6, 0.3, 0.02)


def draw(tokens, N, D, k, dtype=F32, scale=1.0, alphas=ALPHAS):
    """(hidden, weight, token_weights, arguments of the loss): rows at the given rates, noise drawn from q."""
    generator = torch.Generator().manual_seed(0)
    kernel, rows = NoiseKernel(N, k, N - 1), len(alphas)
    x_0 = torch.randint(N - 1, (rows, tokens // rows), generator=generator)
    alpha_t = torch.tensor(alphas, dtype=F64)
    z_t = kernel.corrupt(x_0, alpha_t, generator)
    hidden = torch.randn(*x_0.shape, D, generator=generator).to(dtype)
    weight = (scale * D**-0.5 * torch.randn(N, D, generator=generator)).to(dtype)
    token_weights = torch.rand(x_0.shape, dtype=F64, generator=generator)
    return hidden, weight, token_weights, (x_0, z_t, alpha_t, -torch.ones(rows, dtype=F64), kernel)


def fused(hidden, weight, args, **options):
    return fused_linear_diffusion_loss(hidden, weight, *args, **options)[0]


def plain(hidden, weight, args, token_weights=1.0):
    return (token_weights * diffusion_loss(hidden @ weight.T, *args)).sum()


def leaves(*tensors):
    return [t.detach().clone().requires_grad_() for t in tensors]


def relative_error(a, exact):
    return ((a.double() - exact).norm() / exact.norm()).item()


# --- memory ---------------------------------------------------------------------------------------------------
#
# Bounds in units of one tensor of logits, by the allocator's own record. Plain autograd holds at least two.


@pytest.fixture
def small_blocks(monkeypatch):
    """Scratch buffers of 8192 numbers, so that they weigh nothing beside the small tensors of a test."""
    monkeypatch.setattr(row_passes, "BLOCK_ELEMENTS", {"cpu": 2**13, "other": 2**13})


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_fused_holds_a_chunk_and_no_second_head(dtype, frozen, small_blocks):
    """512 tokens, chunks of 32: beyond the gradients less than a quarter of the logits, or than half the head."""
    hidden, weight, _, args = draw(512, 4096, 256, 0.1, dtype)
    hidden.requires_grad_()
    weight.requires_grad_(not frozen)
    wanted = [hidden] if frozen else [hidden, weight]
    peak = peak_bytes(lambda: torch.autograd.grad(fused(hidden, weight, args, chunk_size=32), wanted))
    logits = 512 * 4096 * dtype.itemsize
    assert peak - sum(leaf.nbytes for leaf in wanted) < min(logits / 4, weight.nbytes / 2) + hidden.numel() * 4


@pytest.mark.parametrize("k", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_plain_holds_one_tensor_of_logits(dtype, k, small_blocks):
    hidden, weight, _, args = draw(512, 4096, 8, k, dtype)
    logits = (hidden @ weight.T).requires_grad_()
    peak = peak_bytes(lambda: torch.autograd.grad(diffusion_loss(logits, *args).sum(), logits))
    assert 1.0 <= peak / logits.nbytes < 1.2


def test_forward_alone_holds_scratch(small_blocks):
    """Without a gradient to come: 5 % of the logits, for logits and head that could have one."""
    hidden, weight, _, args = draw(512, 4096, 8, 0.1)
    logits = (hidden @ weight.T).requires_grad_()
    weight.requires_grad_()
    with torch.no_grad():
        assert peak_bytes(lambda: diffusion_loss(logits, *args)) < 0.05 * logits.nbytes
        assert peak_bytes(lambda: fused(hidden, weight, args, chunk_size=8)) < 0.08 * logits.nbytes


def test_nothing_of_the_vocabularys_size_waits_for_the_backward_pass_in_half_precision():
    hidden, weight, _, args = draw(64, 4096, 32, 0.1, BF16)
    hidden.requires_grad_(), weight.requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        total = fused(hidden, weight, args)
    assert sorted(t.shape[0] for t in kept if t.ndim == 2) == [64, 4096]  # hidden and weight themselves
    context = [t for value in vars(total.grad_fn).values() for t in tensors_in(value)]
    assert context and all(t.numel() <= 64 for t in context)


def tensors_in(value):
    if isinstance(value, torch.Tensor):
        return [value]
    items = value if isinstance(value, (tuple, list)) else getattr(value, "__dict__", {}).values()
    return [t for item in items for t in tensors_in(item)]


# --- k = 0 ----------------------------------------------------------------------------------------------------


def test_k_0_reads_masked_positions_alone():
    """NaN everywhere else stays unseen: losses and gradients are those of the masked positions, zero elsewhere."""
    hidden, weight, _, args = draw(64, 96, 8, 0.0, F64)
    masked = args[1] == 95
    assert masked.any() and not masked.all()
    reference = leaves(hidden @ weight.T, hidden, weight)
    expected = torch.autograd.grad(diffusion_loss(reference[0], *args).sum(), reference[0])
    expected += torch.autograd.grad(plain(*reference[1:], args), reference[1:])

    hidden[~masked] = torch.nan
    logits, hidden, weight = leaves(hidden @ weight.T, hidden, weight)
    loss = diffusion_loss(logits, *args)
    assert (loss[~masked] == 0).all() and (loss[masked] > 0).all()
    ours = torch.autograd.grad(loss.sum(), logits)
    total, per_token = fused_linear_diffusion_loss(hidden, weight, *args, chunk_size=5)
    torch.testing.assert_close(per_token, loss.detach())
    ours += torch.autograd.grad(total, (hidden, weight))
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)
    assert (ours[0][~masked] == 0).all() and (ours[1][~masked] == 0).all()


def test_k_0_without_a_mask_still_has_a_gradient():
    """Data-parallel training waits for one from every rank."""
    hidden, weight, _, args = draw(8, 33, 4, 0.0)
    args = (args[0], args[0], *args[2:])
    for dtype in (F32, BF16):
        h, w = leaves(hidden.to(dtype), weight.to(dtype))
        total = fused(h, w, args)
        total.backward()
        assert total == 0 and (h.grad == 0).all() and (w.grad == 0).all()


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_positions_of_no_weight_may_hold_anything(dtype):
    """Padding that overflowed: its loss is reported as NaN, its gradient is zero and spoils nobody's."""
    hidden, weight, token_weights, args = draw(32, 64, 8, 0.1, dtype)
    token_weights[1, 3:] = 0.0
    h, w = leaves(hidden, weight)
    expected = torch.autograd.grad(diffusion_loss(h @ w.T, *args).sum(-1)[[0, 2, 3]].sum(), h)[0]
    logits = (hidden @ weight.T).requires_grad_()
    with torch.no_grad():
        logits[1] = torch.nan
    loss = diffusion_loss(logits, *args)
    assert loss[1].isnan().all() and loss[[0, 2, 3]].isfinite().all()
    (gradient,) = torch.autograd.grad(loss[[0, 2, 3]].sum(), logits)
    assert (gradient[1] == 0).all()
    torch.testing.assert_close(gradient @ weight, expected, rtol=2e-2, atol=2e-2 * float(expected.abs().max()))


def test_nan_is_not_hidden():
    hidden, weight, _, args = draw(32, 64, 8, 0.1)
    hidden[2, 1, 0] = torch.nan
    total, per_token = fused_linear_diffusion_loss(hidden, weight, *args)
    assert total.isnan() and per_token.isnan().sum() == 1 and per_token[2, 1].isnan()


# --- precision ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frozen", [None, "weight", "hidden"])
@pytest.mark.parametrize("scale", [1.0, 4.0])
@pytest.mark.parametrize("k", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_no_less_precise_than_the_plain_path(dtype, k, scale, frozen):
    """Against float64 on the same numbers, 16 chunks: loss and gradients to 1.1 times the plain path's error.

    The factor of the loss, 1/37, is no power of two: scaling a finished half-precision gradient would round it again.
    """
    *tensors, token_weights, args = draw(256, 2048, 64, k, dtype, scale)
    results = []
    for cast, function in ((dtype, fused), (dtype, plain), (F64, plain)):
        h, w = leaves(*(t.to(cast) for t in tensors))
        wanted = {"weight": [h], "hidden": [w], None: [h, w]}[frozen]
        if frozen is not None:
            (w if frozen == "weight" else h).requires_grad_(False)
        options = {"chunk_size": 16} if function is fused else {}
        total = function(h, w, args, token_weights=token_weights, **options) / 37
        results.append([total.detach(), *torch.autograd.grad(total, wanted)])
    for i, (ours, theirs, exact) in enumerate(zip(*results, strict=True)):
        rounding = 2e-7 if dtype == F32 or i == 0 else 0  # the loss itself is float32
        assert relative_error(ours, exact) <= 1.1 * relative_error(theirs, exact) + rounding


def test_slices_equal_autograd():
    """The half-precision way in float64: 4 slices of a vocabulary of 200, unequal weights, against plain autograd."""
    for k in (0.0, 0.1, 1.0):
        hidden, weight, token_weights, args = draw(40, 200, 6, k, F64)
        token_weights[0, 1] = 0.0
        h, w = leaves(hidden, weight)
        expected = torch.autograd.grad(-3 * plain(h, w, args, token_weights), (h, w))
        objective = fused_module._LossArguments(limit_terms(*args), token_weights.reshape(-1), args[-1], chunk_size=8)
        flat = hidden.reshape(-1, 6)
        statistics, *_ = fused_module._by_token_chunks(flat, weight, None, (False,) * 3, True, objective)
        ours = fused_module._by_vocabulary_slices(
            flat, weight, None, (True, True, False), torch.tensor(-3.0, dtype=F64), statistics, objective
        )
        torch.testing.assert_close(ours[0].reshape(h.shape), expected[0], rtol=1e-11, atol=1e-13)
        torch.testing.assert_close(ours[1], expected[1], rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("k", [0.0, 1e-3, 0.1, 1.0])
def test_real_vocabulary_and_extreme_rates(k, dtype):
    """126 464 rows, alpha from 1e-9 to 1 - 1e-9, flat and sharp predictions: 1e-5 of the token's weight or its loss."""
    N, m, generator = 126_464, 126_336, torch.Generator().manual_seed(0)
    alpha_t = torch.tensor([1e-9, 1e-3, 0.05, 0.07, 0.5, 0.9985, 1 - 1e-9], dtype=F64)
    rows = len(alpha_t)
    x_0 = torch.randint(m, (rows, 3), generator=generator)
    z_t = torch.stack([torch.full((rows,), m), x_0[:, 1], torch.full((rows,), m if k == 0 else 5)], -1)
    logits = torch.randn(rows, 3, N, generator=generator) * torch.tensor([0.5, 3.0, 3.0])[:, None]
    logits[:, 1:].scatter_add_(-1, x_0[:, 1:, None], torch.full((rows, 2, 1), 14.0))
    logits, slope = logits.to(dtype), -torch.ones(rows, dtype=F64)
    args = x_0, z_t, alpha_t, slope, NoiseKernel(N, k, m)
    ours, exact = (diffusion_loss(x, *args).double() for x in (logits, logits.double()))
    weight = torch.where(z_t == x_0, 1.0, 1 / (1 - alpha_t)[:, None])
    assert ((ours - exact).abs() <= 1e-5 * torch.maximum(weight, exact)).all()
    if dtype == F32:
        single, double = leaves(logits, logits.double())
        (a,) = torch.autograd.grad(diffusion_loss(single, *args).sum(), single)
        (b,) = torch.autograd.grad(diffusion_loss(double, *args).sum(), double)
        scale = b.norm(dim=-1).clamp_min(1e-6)
        assert ((a.double() - b).norm(dim=-1) <= 2e-4 * scale).all()


@pytest.mark.parametrize("k", [1e-3, 0.1])
def test_real_vocabulary_equals_the_formula(k):
    """126 464 rows in float64: loss and gradients of the fused loss to 1e-10 of the dense formula under autograd."""
    hidden, weight, token_weights, args = draw(8, 126_464, 8, k, F64, scale=2.0)
    h, w = leaves(hidden, weight)
    expected = dense_loss(h @ w.T, *args[:3], args[-1])
    total, per_token = fused_linear_diffusion_loss(h, w, *args, token_weights=token_weights, chunk_size=3)
    torch.testing.assert_close(per_token, expected.detach(), rtol=1e-10, atol=1e-12)
    gradients = (torch.autograd.grad(loss, (h, w)) for loss in (total, (token_weights * expected).sum()))
    assert all(relative_error(a, b) < 1e-10 for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("k", [1e-3, 0.1, 1.0])
def test_both_ways_to_sum_the_vocabulary_agree(k):
    """Rows are summed as 1 - floor * sum, or term by term where that cancels; a dense float64 formula judges both."""
    N, alphas = 2048, (1e-3, 0.05, 0.3, 0.7)
    hidden, weight, _, args = draw(32, N, 16, k, F64, scale=3.0, alphas=alphas)
    logits = hidden @ weight.T
    expected = dense_loss(logits, *args[:3], args[-1])
    for dtype, tolerance in ((F64, 1e-9), (F32, 2e-5)):
        loss = diffusion_loss(logits.to(dtype), *args).double()
        assert ((loss - expected).abs() <= tolerance * (1 + expected)).all()
    faint = row_passes._floor(limit_terms(*args), logits) * max(64, N / 16) > 1
    assert k == 1e-3 or 0 < faint.sum() < faint.numel()


@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_sharp_logits_lose_nothing(scale):
    """Spread over hundreds of nats, most exponentials leave float32's range: value and gradient equal float64's."""
    hidden, weight, _, args = draw(32, 512, 8, 0.1, F32, scale)
    single = (hidden @ weight.T).requires_grad_()
    double = single.detach().double().requires_grad_()
    results = [diffusion_loss(x, *args) for x in (single, double)]
    torch.testing.assert_close(results[0].double(), results[1], rtol=1e-5, atol=1e-5)
    ours, exact = (torch.autograd.grad(r.sum(), x)[0].double() for r, x in zip(results, (single, double), strict=True))
    assert relative_error(ours, exact) < 3e-5


def test_float16_gradients_survive_under_a_loss_scale():
    """Weights of 1e-6 put every gradient below float16; scaled by 2^16, as a GradScaler would, they are all there."""
    hidden, weight, token_weights, args = draw(64, 256, 16, 0.1, F16)
    h, w = leaves(hidden, weight)
    ours = torch.autograd.grad(2.0**16 * fused(h, w, args, token_weights=1e-6 * token_weights), (h, w))
    exact = leaves(hidden.double(), weight.double())
    expected = torch.autograd.grad(2.0**16 * plain(*exact, args, 1e-6 * token_weights), exact)
    for a, b in zip(ours, expected, strict=True):
        assert relative_error(a, b) < 5e-3


# --- backward passes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_backward_twice(dtype):
    """The first pass hands its gradients over; later ones give the same again, for one input or for both."""
    hidden, weight, token_weights, args = draw(64, 256, 16, 0.1, dtype)
    h, w = leaves(hidden, weight)
    total = fused(h, w, args, token_weights=token_weights, chunk_size=24)
    first = torch.autograd.grad(total / 3, (h, w), retain_graph=True)
    saved = [g.clone() for g in first]
    second = torch.autograd.grad(total / 3, (h, w), retain_graph=True)
    (h_alone,) = torch.autograd.grad(total / 3, h, retain_graph=True)
    (w_alone,) = torch.autograd.grad(total / 3, w)
    assert all(torch.equal(a, b) for a, b in zip(first, saved, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(second, saved, strict=True))
    assert torch.equal(h_alone, saved[0]) and torch.equal(w_alone, saved[1])
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        total.backward()


def test_backward_after_the_head_changed_is_refused():
    """As everywhere in PyTorch: what the recomputation reads must be what the forward pass read."""
    hidden, weight, _, args = draw(32, 64, 8, 0.1, BF16)
    h, w = leaves(hidden, weight)
    total = fused(h, w, args)
    with torch.no_grad():
        w.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_gathered_head(dtype):
    """ZeRO-3 frees a parameter between the passes and gathers it into the same object before each."""
    hidden, weight, _, args = draw(32, 64, 8, 0.1, dtype)
    h, w = leaves(hidden, weight)
    expected = torch.autograd.grad(fused(h, w, args), (h, w))
    total = fused(h, w, args)
    w.data = torch.empty(0, dtype=dtype)
    total.register_hook(lambda _: setattr(w, "data", weight))
    ours = torch.autograd.grad(total, (h, w))
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


# --- surroundings ---------------------------------------------------------------------------------------------


class Network(torch.nn.Module):
    """Embedding, one layer, head; the head may be the embedding."""

    def __init__(self, N, D, tied):
        super().__init__()
        self.embedding, self.layer = torch.nn.Embedding(N, D), torch.nn.Linear(D, D)
        self.head = self.embedding.weight if tied else torch.nn.Parameter(torch.randn(N, D) * D**-0.5)

    def hidden(self, z_t):
        return torch.tanh(self.layer(self.embedding(z_t)))

    def forward(self, args, chunk_size=8):
        return fused(self.hidden(args[1]), self.head, args, chunk_size=chunk_size)

    def gradients(self, total):
        return torch.autograd.grad(total, list(self.parameters()))


def network_and_args(tied=False, dtype=F64):
    *_, args = draw(32, 48, 4, 0.1)
    return Network(48, 8, tied).to(dtype), args


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [F64, BF16])
def test_network(tied, dtype):
    model, args = network_and_args(tied, dtype)
    ours = model.gradients(model(args))
    exact = model.double()
    expected = exact.gradients(plain(exact.hidden(args[1]), exact.head, args))
    for a, b in zip(ours, expected, strict=True):
        assert a.dtype == dtype and relative_error(a, b) < (1e-12 if dtype == F64 else 3e-2)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(use_reentrant):
    """The whole network, loss included, computed again in the backward pass."""
    model, args = network_and_args(tied=True)
    expected = model.gradients(model(args))
    anchor = torch.zeros(1, requires_grad=True)  # the reentrant kind wants an input that requires a gradient
    total = checkpoint(lambda _: model(args), anchor, use_reentrant=use_reentrant)
    total.backward()
    for parameter, b in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, b, rtol=1e-12, atol=1e-14)


def test_torch_compile():
    """A compiled training step calls the losses between its graphs; values and gradients stay the same."""
    model, args = network_and_args()

    def step(model):
        logits = model.hidden(args[1]) @ model.head.T
        kl = kl_divergence(logits, *args[:2], 0.5 + args[2] / 2, args[2], args[-1]).sum()
        return model(args) + diffusion_loss(logits, *args).sum() + kl

    expected = step(model)
    compiled = torch.compile(step, backend="aot_eager")(model)
    torch.testing.assert_close(compiled, expected, rtol=1e-12, atol=0)
    for a, b in zip(model.gradients(compiled), model.gradients(expected), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("hidden_dtype", [F32, BF16])
def test_autocast_takes_a_float32_head(hidden_dtype):
    """As linear under autocast: the product in bfloat16, gradients in each input's own dtype."""
    hidden, weight, token_weights, args = draw(64, 128, 16, 0.1)
    h, w = leaves(hidden.to(hidden_dtype), weight)
    with torch.autocast("cpu", dtype=BF16):
        ours = fused(h, w, args, token_weights=token_weights)
        logits = torch.nn.functional.linear(h, w)
        theirs = (token_weights * diffusion_loss(logits, *args)).sum()
    assert logits.dtype == BF16 and ours.dtype == F32
    torch.testing.assert_close(ours.double(), theirs.double(), rtol=1e-4, atol=0)
    for a, b in zip(torch.autograd.grad(ours, (h, w)), torch.autograd.grad(theirs, (h, w)), strict=True):
        assert a.dtype == b.dtype and relative_error(a, b.double()) < 1e-2


def test_autocast_leaves_float64_alone():
    hidden, weight, _, args = draw(16, 32, 4, 0.1, F64)
    with torch.autocast("cpu", dtype=BF16):
        total = fused(hidden, weight, args)
    assert total.dtype == F64 and torch.equal(total, fused(hidden, weight, args))


def test_dtypes_that_disagree_are_refused():
    hidden, weight, _, args = draw(16, 32, 4, 0.1)
    with pytest.raises(ValueError, match="hidden is torch.bfloat16 and weight torch.float32: cast one, or run under"):
        fused(hidden.to(BF16), weight, args)
