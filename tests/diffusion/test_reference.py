"""The oracle against itself: its three levels agree, and each erratum of docs/equations.md shows in numbers."""

import importlib
import math
import re
from pathlib import Path

import mpmath
import pytest
import torch

from reference import (
    LIMIT_DIGITS,
    MASK_IDS,
    MIXING_RATIOS,
    VOCABULARY,
    Noise,
    bayes_posterior,
    binomial_bound,
    categorical_kl,
    chi_square_p_value,
    clean_distribution,
    dense_kl,
    draw_case,
    exact_braces,
    exact_kl,
    exact_objective,
    exact_softmax,
    f,
    h_finite,
    h_limit,
    log_ratio,
    marginal,
    mdlm_kl,
    mdlm_posterior,
    objective,
    one_hot,
    rate,
    scalar_posterior,
    transition,
    udlm_posterior,
    udlm_rate,
)

GRID = [(k, m) for k in MIXING_RATIOS for m in MASK_IDS]


def tokens(case):
    """Each token of a case as (x_0, p, z, alpha_s, alpha_t), with the linear schedule."""
    p = clean_distribution(case.logits, case.noise)
    for b in range(case.x_0.shape[0]):
        for i in range(case.x_0.shape[1]):
            yield int(case.x_0[b, i]), p[b, i], int(case.z_t[b, i]), 1 - float(case.s[b]), 1 - float(case.t[b])


@pytest.mark.parametrize("k, m", GRID)
def test_kernel_mixes_at_once_and_composes(k, m):
    K = Noise.mixing(VOCABULARY, k, m).kernel()
    assert (K.sum(1) - 1).abs().max() < 1e-15
    assert (K @ K - K).abs().max() < 1e-15  # one application reaches the stationary distribution
    Q_s, Q_ts = transition(0.8, K), transition(0.35 / 0.8, K)
    assert (Q_s @ Q_ts - transition(0.35, K)).abs().max() < 1e-15  # "from" is the row: first s, then t given s


def test_kernel_with_several_special_tokens():
    K = Noise.several(6, {0: 0.25, 4: 0.5}).kernel()
    assert torch.allclose(K[3], torch.tensor([7, 1, 1, 1, 13, 1], dtype=torch.float64) / 24)
    assert (K @ K - K).abs().max() < 1e-15


@pytest.mark.parametrize("k, m", GRID)
def test_printed_equations_equal_matrices(k, m):
    """Eqs. 11, 13, 14 and 15 as printed; Eqs. 16 to 18 at their k. Float64 against matrices or mpmath."""
    case = draw_case(k, m)
    K = case.noise.kernel()
    for x_0, p, z, a_s, a_t in tokens(case):
        q = bayes_posterior(p, z, a_s, a_t, K)
        torch.testing.assert_close(scalar_posterior(p, z, a_s, a_t, case.noise), q, rtol=1e-12, atol=1e-15)
        kl = dense_kl(x_0, p, z, a_s, a_t, case.noise)
        assert float(exact_kl(x_0, p.tolist(), z, a_s, a_t, case.noise)) == pytest.approx(float(kl), abs=1e-13)
        limit = objective(x_0, p, z, a_t, -1.0, case.noise)
        exact = float(exact_objective(x_0, p.tolist(), z, a_t, -1.0, case.noise))
        assert float(limit) == pytest.approx(exact, rel=1e-11, abs=1e-12)
        if k > 0:
            prefactor = (a_s - a_t) / a_s * a_s * rate(z, case.noise) / f(one_hot(x_0, VOCABULARY), z, a_t, case.noise)
            torch.testing.assert_close(prefactor * h_finite(x_0, p, z, a_s, a_t, case.noise), kl, rtol=1e-9, atol=1e-12)
        else:
            torch.testing.assert_close(mdlm_posterior(p, z, a_s, a_t, m), q, rtol=1e-12, atol=1e-15)
            torch.testing.assert_close(mdlm_kl(x_0, p, z, a_s, a_t, m), kl, rtol=1e-11, atol=1e-13)
        if k == 1:
            torch.testing.assert_close(udlm_posterior(p, z, a_s, a_t), q, rtol=1e-12, atol=1e-15)
            assert float(udlm_rate(x_0, p, z, a_t, "corrected")) == pytest.approx(exact, rel=1e-11, abs=1e-12)


def test_erratum_equation_19():
    """Eqs. 19 and 89 turn the sign of 1/f(p,z) - 1/f(x,z); Eq. 105, the last line of their proof, does not."""
    worst = {"printed": 0.0, "eq105": 0.0, "corrected": 0.0}
    negative = 0
    for x_0, p, z, _, a_t in tokens(draw_case(1.0, 0)):
        exact = float(exact_objective(x_0, p.tolist(), z, a_t, -1.0, Noise(VOCABULARY, 1.0, {})))
        for version in worst:
            worst[version] = max(worst[version], abs(float(udlm_rate(x_0, p, z, a_t, version)) - exact) / exact)
        negative += float(udlm_rate(x_0, p, z, a_t, "printed")) < 0
    assert worst["corrected"] < 1e-10 and worst["eq105"] < 1e-10
    assert worst["printed"] > 1
    assert negative > 0  # and a divergence cannot be negative


def test_erratum_equation_17_needs_the_mask_indicator():
    """As printed (= Eq. 68) the KL is positive on an unmasked token, where both posteriors are the same one-hot."""
    noise = Noise.mixing(VOCABULARY, 0.0, 3)
    p = clean_distribution(torch.zeros(VOCABULARY), noise)
    assert dense_kl(1, p, 1, 0.8, 0.4, noise) == 0
    assert -(0.8 - 0.4) / (1 - 0.4) * math.log(p[1]) == pytest.approx(1.194506, abs=1e-6)


def test_erratum_equations_43_to_50_misprint_the_evidence():
    """Eq. 42 has f_t(p, z_t); Eqs. 43, 44 print f_t|s(e, z_t) in its place, Eqs. 45, 48, 50 print f_t|s(z_t, p)."""
    a_s, a_t, z, x_0 = 0.7, 0.5, 1, 2
    noise, N = Noise.mixing(VOCABULARY, 0.5, 0), VOCABULARY
    p = clean_distribution(torch.linspace(-1, 1, N), noise)
    kl = dense_kl(x_0, p, z, a_s, a_t, noise)

    def divergence(evidence):
        """Eq. 43 with evidence[e] in the place in question."""
        K = noise.kernel()
        q = bayes_posterior(one_hot(x_0, N), z, a_s, a_t, K)
        f_x, f_p = marginal(one_hot(x_0, N), a_s, K), marginal(p, a_s, K)
        return float((q * (f_x * evidence / (marginal(one_hot(x_0, N), a_t, K)[z] * f_p)).log()).sum())

    step = transition(a_t / a_s, noise.kernel())[:, z]  # f_t|s(e, z_t) for each e
    assert divergence(f(p, z, a_t, noise)) == pytest.approx(float(kl), abs=1e-14)
    assert float(kl) == pytest.approx(0.9344, abs=1e-4)
    assert divergence(step) == pytest.approx(1.3302, abs=1e-4)
    # Eq. 45 is the part that stays; there f_t|s(z_t, p) can only mean the average of the steps to z_t over p
    stays = a_t / a_s * f(one_hot(x_0, N), z, a_s, noise) / f(one_hot(x_0, N), z, a_t, noise)
    error = stays * ((step @ p) / f(p, z, a_t, noise)).log()
    assert float(kl + error) == pytest.approx(0.9211, abs=1e-4)


def test_erratum_equation_52_drops_a_term_that_is_zero_only_without_mask_probability():
    """mu log f(x,m)/f(p,m) is said to vanish for all x and p; with p_m = 0.3 leaving it out makes the KL wrong."""
    N, k, m, a_s, a_t = 5, 0.1, 4, 0.7, 0.5
    noise = Noise.mixing(N, k, m)
    p = torch.tensor([0.4, 0.1, 0.1, 0.1, 0.3], dtype=torch.float64)
    kl = dense_kl(0, p, m, a_s, a_t, noise)
    prefactor = (a_s - a_t) * rate(m, noise) / f(one_hot(0, N), m, a_t, noise)
    printed = prefactor * h_finite(0, p, m, a_s, a_t, noise)
    dropped = prefactor * (1 - k) * (1 - a_s) / a_s * log_ratio(0, p, m, a_s, noise)
    assert float(printed + dropped) == pytest.approx(float(kl), abs=1e-13)
    assert float(printed - kl) == pytest.approx(0.0873, abs=1e-4)
    assert float(kl) == pytest.approx(0.2889, abs=1e-4)


def test_erratum_equation_13_is_not_finite_at_k_0():
    """Its sum is 0 log(0/0) on every token that neither x_0 nor p holds, and r(z) divides by 0 on unmasked tokens."""
    noise = Noise.mixing(4, 0.0, 0)
    p = torch.tensor([0.0, 0.5, 0.5, 0.0], dtype=torch.float64)
    assert torch.isnan(h_finite(1, p, 0, 0.8, 0.4, noise))
    assert not torch.isfinite(h_finite(1, p, 1, 0.8, 0.4, noise))
    assert dense_kl(1, p, 0, 0.8, 0.4, noise) == pytest.approx(2 / 3 * math.log(2))


def test_erratum_algorithm_1_top_k_beyond_the_candidates():
    """topk over -inf priorities returns positions all the same: 2 candidates and a budget of 4 mark 4 positions."""
    priority = torch.full((10,), -torch.inf)
    priority[[3, 7]] = torch.tensor([0.5, 0.6])
    _, chosen = torch.topk(priority, k=4)
    assert len(set(chosen.tolist()) - {3, 7}) == 2


def test_equation_14_cancels_as_alpha_vanishes():
    """In float32 Eq. 14 is off by more than 10 % at alpha = 1e-6 and by a multiple at 1e-7; at 1e-3 it is fine."""
    noise = Noise.mixing(VOCABULARY, 0.1, 0)
    p64 = clean_distribution(torch.linspace(-1, 1, VOCABULARY), noise)
    error = {}
    for alpha in (1e-3, 1e-6, 1e-7):
        exact = float(exact_objective(2, p64.tolist(), 2, alpha, -1.0, noise))
        alpha32 = torch.tensor(alpha, dtype=torch.float32)
        weight = float(rate(2, noise) / f(one_hot(2, VOCABULARY), 2, alpha, noise))
        error[alpha] = abs(float(h_limit(2, p64.float(), 2, alpha32, noise)) * weight / exact - 1)
    assert error[1e-3] < 1e-3 and error[1e-6] > 0.1 and error[1e-7] > 1


@pytest.mark.parametrize("special", [{}, {3: "0.1"}, {3: "0.9"}, {3: "0.999"}, {0: "0.3", 6: "0.5"}])
def test_rearranged_forms_of_the_equation_page(special):
    """Finite step and limit in terms of rho equal Eqs. 2 and 4 to 30 digits, x_0 = [MASK] included."""
    case = draw_case(0.5, 3)
    with mpmath.workdps(LIMIT_DIGITS):
        mu = {i: mpmath.mpf(v) for i, v in special.items()}
        noise = Noise(VOCABULARY, 1 - mpmath.fsum(mu.values()), mu)
        for n, (x_0, _, z, a_s, a_t) in enumerate(tokens(case)):
            x_0 = 3 if n % 5 == 4 else x_0
            p = exact_softmax(case.logits[0, n % 5].tolist(), noise)
            a_s, a_t = mpmath.mpf(a_s), mpmath.mpf(a_t)
            r_z = noise.k / VOCABULARY + mu.get(z, 0)
            f_x = a_t * (x_0 == z) + (1 - a_t) * r_z
            B = (1 - a_t / a_s) * r_z / f_x
            kl = B * a_s * exact_braces(x_0, p, z, a_s, B, noise)
            assert abs(kl - exact_kl(x_0, p, z, a_s, a_t, noise)) < mpmath.mpf(10) ** -30
            limit = r_z / f_x * exact_braces(x_0, p, z, a_t, 0, noise)
            assert abs(limit - exact_objective(x_0, p, z, a_t, -1, noise)) < mpmath.mpf(10) ** -30


def test_frequency_tests_accept_the_right_law_and_reject_a_close_one():
    generator = torch.Generator().manual_seed(3)
    probs = torch.tensor([0.5, 0.3, 0.195, 0.005, 0.0], dtype=torch.float64)
    draws = torch.multinomial(probs, 50_000, replacement=True, generator=generator)
    counts = draws.bincount(minlength=5)
    assert chi_square_p_value(counts, probs) > 1e-3
    assert chi_square_p_value(counts, probs + torch.tensor([0, 0, 0.0025, -0.0025, 0])) < 1e-6
    assert chi_square_p_value(counts + torch.tensor([0, 0, 0, 0, 1]), probs) == 0
    # 60 of 100 fair tosses: KL = 0.6 log 1.2 + 0.4 log 0.8 = 0.02014, and 2 exp(-2.014) = 0.267 (exact: 0.057)
    assert binomial_bound(60, 100, 0.5) == pytest.approx(0.267, abs=1e-3)
    assert binomial_bound(25, 100, 0.5) < 1e-5 and binomial_bound(0, 100, 0.5) < 1e-29
    assert binomial_bound(1, 100, 0.0) == 0 and binomial_bound(0, 100, 0.0) == 1


def test_the_equation_page_names_what_exists():
    """Every test and every module.name in backticks of docs/equations.md is there."""
    root = Path(__file__).resolve().parents[2]
    page = (root / "docs" / "equations.md").read_text()
    tests = "".join(path.read_text() for path in (root / "tests").rglob("test_*.py"))
    tests += "".join(f"def {path.stem}(" for path in (root / "tests").rglob("test_*.py"))
    named = set(re.findall(r"`(test_\w+)`", page))
    assert len(named) > 25 and not [name for name in named if f"def {name}(" not in tests]
    modules = "schedules|noise|reverse|objective|losses|process|gidd|ops.rows|ops.fused"
    named = set(re.findall(rf"`((?:{modules})\.\w+(?:\.\w+)?|generation\.[\w.]+)`", page))
    assert len(named) > 15
    for name in named:
        package = "xdlm_hf" if name.startswith("generation.") else "xdlm_hf.diffusion"
        module = re.match(rf"{modules}|generation\.\w+", name).group()
        found = importlib.import_module(f"{package}.{module}")
        for attribute in name.removeprefix(f"{module}.").split("."):
            found = getattr(found, attribute)


def test_marginal_and_kl_by_hand():
    """N = 2, k = 1: K is all 1/2. alpha = 0.6 gives q(z | x = 0) = (0.8, 0.2)."""
    K = Noise(2, 1.0, {}).kernel()
    torch.testing.assert_close(marginal(one_hot(0, 2), 0.6, K), torch.tensor([0.8, 0.2], dtype=torch.float64))
    q, p = torch.tensor([1.0, 0.0]).double(), torch.tensor([0.25, 0.75]).double()
    assert float(categorical_kl(q, p)) == pytest.approx(math.log(4))
