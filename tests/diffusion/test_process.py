"""Noise processes: schedule and noise together, against the functions they join and against explicit matrices."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from reference import chi_square_p_value
from xdlm_hf import (
    CosineSchedule,
    GIDDProcess,
    LinearSchedule,
    LogLinearSchedule,
    NoiseKernel,
    StationaryProcess,
    diffusion_loss,
    fused_linear_diffusion_loss,
    posterior,
    sample_posterior,
)

B, L, N, MASK = 3, 5, 7, 2
RECORDED = load_file(Path(__file__).parents[1] / "fixtures" / "tiny-dit" / "expected.safetensors")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def draw(process, t, seed=0, length=L):
    """Clean ids without [MASK], noisy ids and float64 logits."""
    x_0 = torch.randint(0, process.vocab_size - 1, (len(t), length), generator=generator(seed))
    x_0 += x_0 >= (N if process.mask_token_id is None else process.mask_token_id)
    z_t = process.corrupt(x_0, t, generator(seed + 1))
    return x_0, z_t, torch.randn(*x_0.shape, process.vocab_size, generator=generator(seed + 2), dtype=torch.float64)


class TestStationary:
    @pytest.fixture(params=[(0.0, MASK), (0.1, MASK), (1.0, None)], ids=["mdlm", "xdlm", "udlm"])
    def kernel(self, request):
        return NoiseKernel(N, *request.param)

    @pytest.fixture(params=[LinearSchedule, CosineSchedule, LogLinearSchedule])
    def schedule(self, request):
        return request.param()

    @pytest.mark.parametrize("shape", [(B,), (B, 1)])
    def test_every_method_is_the_function_at_the_schedule_s_rates(self, kernel, schedule, shape):
        process = StationaryProcess(kernel, schedule)
        s, t = torch.tensor([0.1, 0.3, 0.5]).view(shape), torch.tensor([0.2, 0.6, 0.9]).view(shape)
        (alpha_s, _), (alpha_t, d_alpha_t) = schedule(s), schedule(t)
        x_0, z_t, logits = draw(process, t)
        p = logits.softmax(-1)
        assert torch.equal(process.corrupt(x_0, t, generator(5)), kernel.corrupt(x_0, alpha_t, generator(5)))
        assert torch.equal(process.sample_prior((4, 9), generator(5)), kernel.sample_prior((4, 9), generator(5)))
        assert torch.equal(
            process.loss(logits, x_0, z_t, t), diffusion_loss(logits, x_0, z_t, alpha_t, d_alpha_t, kernel)
        )
        assert torch.equal(process.posterior(p, z_t, s, t), posterior(p, z_t, alpha_s, alpha_t, kernel))
        assert torch.equal(
            process.sample_posterior(logits, z_t, s, t, generator(5)),
            sample_posterior(logits, z_t, alpha_s, alpha_t, kernel, generator(5)),
        )
        hidden, weight = torch.randn(B, L, 4), torch.randn(N, 4)
        token_weights = torch.rand(B, L)
        ours = process.fused_loss(hidden, weight, x_0, z_t, t, token_weights, chunk_size=4)
        theirs = fused_linear_diffusion_loss(
            hidden, weight, x_0, z_t, alpha_t, d_alpha_t, kernel, token_weights, chunk_size=4
        )
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


PROCESSES = [StationaryProcess(NoiseKernel(N, 0.1, MASK), LinearSchedule()), GIDDProcess(N, MASK, 0.2)]


@pytest.mark.parametrize("process", PROCESSES, ids=repr)
class TestBadInput:
    def test_times(self, process):
        ids, p = torch.zeros(B, L, dtype=torch.long), torch.full((B, L, N), 1 / N)
        half = torch.full((B,), 0.5)
        with pytest.raises(ValueError, match=r"t holds 1.5; a time lies in \[0, 1\]"):
            process.corrupt(ids, torch.full((B,), 1.5))
        with pytest.raises(ValueError, match="t holds nan"):
            process.loss(p, ids, ids, torch.full((B,), torch.nan))
        with pytest.raises(ValueError, match=r"s must be the earlier, cleaner time"):
            process.posterior(p, ids, half, half / 2)
        with pytest.raises(ValueError, match=r"of shape \(4, 1\) does not fit ids of shape \(3, 5\)"):
            process.sample_posterior(p, ids, half, torch.full((4,), 0.5))

    def test_ids(self, process):
        ids, t = torch.full((B, L), N), torch.full((B,), 0.5)
        logits = torch.zeros(B, L, N)
        for call in (
            lambda: process.corrupt(ids, t),
            lambda: process.loss(logits, ids, ids, t),
            lambda: process.posterior(logits, ids, t / 2, t),
        ):
            with pytest.raises(ValueError, match=rf"token id {N}, outside \[0, {N}\)"):
                call()


@pytest.mark.parametrize("p_uniform", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("gamma", [1.0, 1.5])
class TestGIDD:
    """Against Q_t|s = a_ts I + 1 b_ts^T, N x N, built here from alpha_t and b_t alone."""

    def process(self, p_uniform, gamma):
        return GIDDProcess(N, MASK, p_uniform, gamma)

    def marginal(self, p_uniform, gamma, t):
        """Q_t, rows are x: alpha_t and b_t as the paper defines them."""
        share = max(p_uniform, torch.tensor(-20.0, dtype=torch.float64).exp().item())
        c = 2**gamma * share / (1 - share) * (t * (1 - t)) ** (gamma / 2)
        b = torch.full((N,), c / (N - 1) / (1 + c), dtype=torch.float64)
        b[MASK] = t / (1 + c)
        return (1 - t) / (1 + c) * torch.eye(N, dtype=torch.float64) + b

    def transition(self, p_uniform, gamma, s, t):
        """Q_t|s, the matrix that takes Q_s to Q_t."""
        return torch.linalg.solve(self.marginal(p_uniform, gamma, s), self.marginal(p_uniform, gamma, t))

    def bayes(self, p_uniform, gamma, x, z, s, t):
        """q(z_s | z_t = z, x) for a distribution x over clean tokens."""
        joint = (x @ self.marginal(p_uniform, gamma, s)) * self.transition(p_uniform, gamma, s, t)[:, z]
        return joint / joint.sum()

    def prediction(self, seed=0):
        logits = torch.randn(N, generator=generator(seed), dtype=torch.float64)
        logits[MASK] = -torch.inf
        return logits, logits.softmax(-1)

    def test_steps_are_stochastic_and_noise_adds_up(self, p_uniform, gamma):
        Q = self.transition(p_uniform, gamma, 0.3, 0.7)
        assert (Q > -1e-12).all() and torch.allclose(Q.sum(-1), torch.ones(N, dtype=torch.float64))
        process, t = self.process(p_uniform, gamma), torch.tensor([[0.3]], dtype=torch.float64)
        ids = torch.arange(N)[None]
        b_t = (1 - process.alpha(t)) * process.noise(t).rate(ids, torch.float64)
        expected = self.marginal(p_uniform, gamma, 0.3)
        torch.testing.assert_close(process.alpha(t) * torch.eye(N, dtype=torch.float64) + b_t, expected)

    def test_posterior(self, p_uniform, gamma):
        process, (_, p) = self.process(p_uniform, gamma), self.prediction()
        for s, t in ((0.0, 0.4), (0.3, 0.31), (0.2, 0.9), (0.5, 1.0)):
            if t == 1.0:
                z_t = torch.full((1, 1), MASK)
            else:
                z_t = torch.arange(N)[:, None]
            rows = len(z_t)
            found = process.posterior(
                p.expand(rows, 1, N), z_t, torch.full((rows,), s).double(), torch.full((rows,), t).double()
            )
            expected = torch.stack([self.bayes(p_uniform, gamma, p, z, s, t) for z in z_t.flatten()])
            # p_uniform = 0 leaves noise of 1e-9, which the matrices resolve to 1e-6 of itself.
            torch.testing.assert_close(found[:, 0], expected, atol=1e-9, rtol=1e-6)

    def test_draws_follow_the_posterior(self, p_uniform, gamma):
        """False alarm: 1e-4 each, over 7 values of z_t and 6 processes."""
        process, (logits, p), draws = self.process(p_uniform, gamma), self.prediction(), 20_000
        for z in range(N):
            z_t = torch.full((1, draws), z)
            s, t = torch.tensor([0.3]), torch.tensor([0.8])
            drawn = process.sample_posterior(logits.expand(1, draws, N), z_t, s, t, generator(z))
            expected = self.bayes(p_uniform, gamma, p, z, 0.3, 0.8).clamp_min(0)
            assert chi_square_p_value(drawn.flatten().bincount(minlength=N), expected / expected.sum()) > 1e-4

    def test_corruption_follows_the_marginal(self, p_uniform, gamma):
        process, draws = self.process(p_uniform, gamma), 20_000
        for x in (0, 5):
            z_t = process.corrupt(torch.full((1, draws), x), torch.tensor([0.4]), generator(x))
            counts = z_t.flatten().bincount(minlength=N)
            assert chi_square_p_value(counts, self.marginal(p_uniform, gamma, 0.4)[x]) > 1e-4

    def test_prior_is_all_masks(self, p_uniform, gamma):
        assert (self.process(p_uniform, gamma).sample_prior((2, 50)) == MASK).all()

    @pytest.mark.parametrize("t", [0.2, 0.6])
    def test_loss_is_the_limit_of_the_divergence_of_one_step(self, p_uniform, gamma, t):
        """The quotient KL(q(z_s | z_t, x) || q(z_s | z_t, p)) / (t - s) tends to the loss at first order."""
        process, (logits, p) = self.process(p_uniform, gamma), self.prediction()
        # Without uniform noise the matrices hold 1e-9 beside 1; only masks then tell anything.
        ids = range(N) if p_uniform else [MASK]
        for z in ids:
            x = torch.nn.functional.one_hot(torch.tensor(4), N).double()
            time = torch.tensor([t], dtype=torch.float64)
            loss = process.loss(logits[None, None], torch.tensor([[4]]), torch.tensor([[z]]), time)
            errors = []
            for step in (1e-3, 1e-4):
                q, r = (self.bayes(p_uniform, gamma, y, z, t - step, t).clamp_min(1e-300) for y in (x, p))
                errors.append(((q * (q / r).log()).sum() / step - loss).abs().item())
            assert errors[1] <= 0.2 * errors[0] + (1e-7 if p_uniform else 1e-6) and errors[1] <= 1e-2 * max(
                loss.item(), 1
            )

    def test_gradient(self, p_uniform, gamma):
        process, t = self.process(p_uniform, gamma), torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
        x_0, z_t, logits = draw(process, t)
        assert torch.autograd.gradcheck(lambda y: process.loss(y, x_0, z_t, t), logits.requires_grad_())


@pytest.mark.parametrize("p_uniform", ["0", "0.1", "0.2"])
def test_gidd_gives_what_the_released_code_gave(p_uniform):
    """Recorded in float32, by formulas that cancel a little."""
    recorded = {name: RECORDED[f"gidd{p_uniform}.{name}"] for name in ("elbo", "alpha_t", "beta_pi_t", "posterior")}
    logits, x_0, z_t = (RECORDED[name] for name in ("logits_sigma_zero", "x0", "zt"))
    process = GIDDProcess(61, 60, float(p_uniform))
    t, s = RECORDED["t"], RECORDED["s"]
    torch.testing.assert_close(process.alpha(t[:, None]).float(), recorded["alpha_t"], rtol=1e-6, atol=0)
    b_t = (1 - process.alpha(t[:, None])) * process.noise(t[:, None]).rate(torch.arange(61)[None], torch.float64)
    torch.testing.assert_close(b_t.float(), recorded["beta_pi_t"], rtol=1e-5, atol=1e-10)
    possible = (z_t == x_0) | (z_t == 60) | (float(p_uniform) > 0)  # others have probability 1e-9, lost in float32
    loss = process.loss(logits, x_0, z_t, t)
    torch.testing.assert_close(loss[possible], recorded["elbo"][possible], rtol=2e-6, atol=1e-9)
    p = logits.clone()
    p[..., 60] = -torch.inf
    found = process.posterior(p.softmax(-1), z_t, s, t)
    torch.testing.assert_close(found[possible], recorded["posterior"][possible], rtol=2e-6, atol=2e-7)


@pytest.mark.parametrize("p_uniform", ["0", "0.1", "0.2"])
def test_gidd_weights_the_training_loss_as_the_released_code(p_uniform):
    recorded = {name: RECORDED[f"gidd{p_uniform}.{name}"] for name in ("elbo_weight", "loss_weight", "loss")}
    logits, x_0, z_t, t = (RECORDED[name] for name in ("logits_sigma_zero", "x0", "zt", "t"))
    process = GIDDProcess(61, 60, float(p_uniform))
    factor = process.weighting_factor(x_0, z_t, t, "dynamic")
    torch.testing.assert_close((factor * recorded["elbo_weight"]).float(), recorded["loss_weight"], rtol=2e-5, atol=0)
    possible = (z_t == x_0) | (z_t == 60) | (float(p_uniform) > 0)
    loss = (factor * process.loss(logits, x_0, z_t, t)).float()
    torch.testing.assert_close(loss[possible], recorded["loss"][possible], rtol=2e-5, atol=1e-9)
    clipped = (process.weighting_factor(x_0, z_t, t, "clip") * recorded["elbo_weight"]).float()
    torch.testing.assert_close(clipped[possible], recorded["elbo_weight"].clamp(max=2)[possible], rtol=2e-5, atol=0)


@pytest.mark.parametrize("t", [0.0, 1.0])
@pytest.mark.parametrize("weighting", ["clip", "dynamic"])
def test_weights_of_the_training_loss_stay_finite_at_both_ends(t, weighting):
    process = GIDDProcess(7, 3, 0.2)
    x_0 = torch.arange(7)[None].masked_fill(torch.arange(7) == 3, 0)
    for z_t in (x_0, torch.full_like(x_0, 3), x_0.roll(1)):
        assert process.weighting_factor(x_0, z_t, torch.tensor([t]), weighting).isfinite().all()


def test_a_weighting_belongs_to_a_process():
    stationary = StationaryProcess(NoiseKernel(7, 0.5, 3), LinearSchedule())
    ids, t = torch.zeros(1, 2, dtype=torch.long), torch.tensor([0.5])
    assert stationary.weighting_factor(ids, ids, t, "elbo") is None
    with pytest.raises(ValueError, match=r"gidd_weighting='dynamic' is not one of \('elbo',\)"):
        stationary.weighting_factor(ids, ids, t, "dynamic")
    with pytest.raises(ValueError, match="gidd_weighting='clip' is for gamma=1, not 2.0"):
        GIDDProcess(7, 3, 0.1, 2.0).weighting_factor(ids, ids, t, "clip")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1, 0, 0.1), "vocab_size=1 must be an integer of at least 2"),
        ((7, 7, 0.1), r"mask_token_id=7 is not in \[0, 7\)"),
        ((7, 0, 1.0), r"p_uniform=1.0 must lie in \[0, 1\)"),
        ((7, 0, 0.1, 0.0), "gamma=0.0 must be positive"),
    ],
)
def test_arguments_of_gidd(arguments, message):
    with pytest.raises(ValueError, match=message):
        GIDDProcess(*arguments)
