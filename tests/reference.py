"""Dense oracle for the diffusion core: the paper's equations applied to explicit N x N float64 matrices.

t = 0 is clean, t = 1 is noise, s < t. N counts every row of the output layer, [MASK] and padding included.
Nothing here is fast, and nothing here shares a line with the package. Shape legend: B batch, L length,
N vocabulary (at most 16).

Three levels, each independent of the next:

* matrices: K (Lemma 3.1), Q_t|s (Eq. 5), the posterior by Bayes' rule (Eq. 2), the KL as a sum over tokens (Eq. 4);
* print: Eqs. 9 to 19 and 105 typed in as they stand, beside the corrections that docs/equations.md claims;
* digits: Eqs. 2 and 4 with mpmath, where float64 itself cancels; the limit s -> t is a difference quotient there.
"""

import math
from typing import NamedTuple

import mpmath
import torch
from torch import Tensor

MAX_VOCABULARY = 16
LIMIT_DIGITS = 220  # the quotient below loses 2 x 60 of them
LIMIT_STEP = 60  # the step is 10 ** -60


class Noise(NamedTuple):
    """The weights of Lemma 3.1: k on the uniform part, special[i] = mu_i on token i, k + sum mu_i = 1."""

    vocab_size: int
    k: float
    special: dict[int, float]

    @classmethod
    def mixing(cls, vocab_size: int, k: float, mask_token_id: int | None) -> "Noise":
        """Eq. 7: mu = 1 - k on [MASK]."""
        return cls(vocab_size, k, {} if k == 1 else {mask_token_id: 1.0 - k})

    @classmethod
    def several(cls, vocab_size: int, special: dict[int, float]) -> "Noise":
        """Eq. 6 with any number of special tokens."""
        return cls(vocab_size, 1.0 - math.fsum(special.values()), dict(special))

    @property
    def absorbing(self) -> list[int]:
        return [i for i, mu_i in self.special.items() if mu_i > 0]

    def kernel(self) -> Tensor:
        """K = (k/N) J + sum_i mu_i M_i, Eq. 6; (N, N) float64, rows are "from"."""
        if self.vocab_size > MAX_VOCABULARY:
            raise ValueError(f"the dense oracle is meant for N <= {MAX_VOCABULARY}, got {self.vocab_size}")
        K = self.k / self.vocab_size * torch.ones(self.vocab_size, self.vocab_size, dtype=torch.float64)
        for i, mu_i in self.special.items():
            M_i = torch.zeros_like(K)
            M_i[:, i] = 1.0  # the absorbing matrix sends every state to i
            K = K + mu_i * M_i
        return K


# --- matrices -------------------------------------------------------------------------------------------------


def transition(alpha_ts: float | Tensor, K: Tensor) -> Tensor:
    """Q_t|s = alpha_ts I + beta_ts K, Eq. 5."""
    return alpha_ts * torch.eye(K.shape[0], dtype=torch.float64) + (1.0 - alpha_ts) * K


def step_rate(alpha_s: float, alpha_t: float) -> float:
    """alpha_ts = alpha_t / alpha_s; one where the two agree, alpha = 0 included: nothing happens in between."""
    return 1.0 if alpha_s == alpha_t else alpha_t / alpha_s


def one_hot(index: int, vocab_size: int) -> Tensor:
    x = torch.zeros(vocab_size, dtype=torch.float64)
    x[index] = 1.0
    return x


def marginal(x: Tensor, alpha_t: float, K: Tensor) -> Tensor:
    """q(z_t | x) = Q_t^T x, Eq. 1 from the clean end; x is (N,)."""
    return transition(alpha_t, K).T @ x


def bayes_posterior(x: Tensor, z_t: int, alpha_s: float, alpha_t: float, K: Tensor) -> Tensor:
    """q(z_s | z_t, x) = (Q_t|s z_t) * (Q_s^T x) / (z_t^T Q_t^T x), Eq. 2; x is (N,), result (N,)."""
    z = one_hot(z_t, K.shape[0])
    Q_ts = transition(step_rate(alpha_s, alpha_t), K)
    Q_s, Q_t = transition(alpha_s, K), transition(alpha_t, K)
    return (Q_ts @ z) * (Q_s.T @ x) / (z @ Q_t.T @ x)


def categorical_kl(q: Tensor, p: Tensor) -> Tensor:
    """sum_e q_e log(q_e / p_e) over the support of q, so that 0 log 0 = 0."""
    support = q > 0
    return (q[support] * (q[support] / p[support]).log()).sum()


def dense_kl(x_0: int, p_x0: Tensor, z_t: int, alpha_s: float, alpha_t: float, noise: Noise) -> Tensor:
    """KL term of Eq. 4 for one token, in nats: the two dense posteriors, summed over z_s."""
    K = noise.kernel()
    q = bayes_posterior(one_hot(x_0, noise.vocab_size), z_t, alpha_s, alpha_t, K)
    return categorical_kl(q, bayes_posterior(p_x0, z_t, alpha_s, alpha_t, K))


def clean_distribution(logits: Tensor, noise: Noise) -> Tensor:
    """softmax of logits (..., N) in float64, with probability zero on absorbing tokens (mu_i > 0)."""
    keep = torch.ones(logits.shape[-1], dtype=torch.bool)
    keep[noise.absorbing] = False
    kept = logits.double()[..., keep]
    weight = (kept - kept.amax(-1, keepdim=True)).exp()
    p = torch.zeros(logits.shape, dtype=torch.float64)
    p[..., keep] = weight / weight.sum(-1, keepdim=True)
    return p


# --- print ----------------------------------------------------------------------------------------------------


def rate(e: int, noise: Noise) -> float:
    """r(e) = k/N + mu [e = m], Eq. 9, with mu_e for any special token e."""
    return noise.k / noise.vocab_size + noise.special.get(e, 0.0)


def f(x: Tensor, e: int, alpha_t: float, noise: Noise) -> Tensor:
    """f_t(x, e) = alpha_t x_e + beta_t r(e), Eq. 10."""
    return alpha_t * x[e] + (1.0 - alpha_t) * rate(e, noise)


def scalar_posterior(x: Tensor, z_t: int, alpha_s: float, alpha_t: float, noise: Noise) -> Tensor:
    """Eq. 11, token by token."""
    N = noise.vocab_size
    alpha_ts = step_rate(alpha_s, alpha_t)
    numerator = [f(x, e, alpha_s, noise) * f(one_hot(e, N), z_t, alpha_ts, noise) for e in range(N)]
    return torch.stack(numerator) / f(x, z_t, alpha_t, noise)


def log_ratio(x_0: int, p: Tensor, e: int, alpha: float, noise: Noise) -> Tensor:
    """log f(x, e) / f(p, e) with x one-hot at x_0."""
    return (f(one_hot(x_0, noise.vocab_size), e, alpha, noise) / f(p, e, alpha, noise)).log()


def h_finite(x_0: int, p: Tensor, z: int, alpha_s: float, alpha_t: float, noise: Noise) -> Tensor:
    """h_t of Eq. 13. Only for k > 0: at k = 0 its terms are 0 log(0/0), so it is not finite as it stands."""
    N, k = noise.vocab_size, noise.k
    alpha_ts = alpha_t / alpha_s
    f_s = f(one_hot(x_0, N), z, alpha_s, noise)
    at_t, at_s = log_ratio(x_0, p, z, alpha_t, noise), log_ratio(x_0, p, z, alpha_s, noise)
    first = f_s / rate(z, noise) * alpha_ts / ((1.0 - alpha_ts) * alpha_s) * (at_s - at_t)
    total = sum(log_ratio(x_0, p, e, alpha_s, noise) for e in range(N))
    uniform = k * (1.0 - alpha_s) / (N * alpha_s) * total
    return first - at_t / alpha_s + log_ratio(x_0, p, x_0, alpha_s, noise) + uniform


def h_limit(x_0: int, p: Tensor, z: int, alpha_t: float, noise: Noise) -> Tensor:
    """h_t of Eq. 14, with the sum left out at k = 0, where it is 0 log(0/0)."""
    N, k = noise.vocab_size, noise.k
    w = (float(x_0 == z) - p[z]) / f(p, z, alpha_t, noise)
    h = w - log_ratio(x_0, p, z, alpha_t, noise) / alpha_t + log_ratio(x_0, p, x_0, alpha_t, noise)
    if k > 0:
        total = sum(log_ratio(x_0, p, e, alpha_t, noise) for e in range(N))
        h = h + k * (1.0 - alpha_t) / (N * alpha_t) * total
    return h


def objective(x_0: int, p: Tensor, z: int, alpha_t: float, d_alpha_t: float, noise: Noise) -> Tensor:
    """-alpha'_t r(z) / f_t(x, z) h_t, the integrand of Eq. 15; zero where r(z) = 0, whatever h_t is."""
    r_z = rate(z, noise)
    if r_z == 0:
        return p.sum() * 0.0
    weight = -d_alpha_t * r_z / f(one_hot(x_0, noise.vocab_size), z, alpha_t, noise)
    return weight * h_limit(x_0, p, z, alpha_t, noise)


def mdlm_posterior(p: Tensor, z: int, alpha_s: float, alpha_t: float, m: int) -> Tensor:
    """Eq. 16, first line."""
    alpha_ts = step_rate(alpha_s, alpha_t)
    beta_s, beta_t, beta_ts = 1.0 - alpha_s, 1.0 - alpha_t, 1.0 - alpha_ts
    if z != m:
        return one_hot(z, p.shape[0])
    return one_hot(m, p.shape[0]) * beta_s / beta_t + beta_ts * alpha_s * p / beta_t


def mdlm_kl(x_0: int, p: Tensor, z: int, alpha_s: float, alpha_t: float, m: int) -> Tensor:
    """Eq. 17 with the factor [z_t = m], which only the last line of its proof, Eq. 87, carries."""
    return -float(z == m) * (alpha_s - alpha_t) / (1.0 - alpha_t) * p[x_0].log()


def udlm_posterior(p: Tensor, z: int, alpha_s: float, alpha_t: float) -> Tensor:
    """Eq. 18."""
    N = p.shape[0]
    alpha_ts = step_rate(alpha_s, alpha_t)
    beta_s, beta_t, beta_ts = 1.0 - alpha_s, 1.0 - alpha_t, 1.0 - alpha_ts
    stay = one_hot(z, N) * (N * alpha_t * p + beta_s * alpha_ts)
    return (stay + (alpha_s - alpha_t) * p + beta_s * beta_ts / N) / (N * alpha_t * p[z] + beta_t)


def udlm_rate(x_0: int, p: Tensor, z: int, alpha_t: float, version: str) -> Tensor:
    """KL / (beta_ts alpha_s) at k = 1 as s -> t: Eq. 19 "printed" (= Eq. 89), Eq. 105, or Eq. 19 "corrected"."""
    N = p.shape[0]
    uniform = Noise(N, 1.0, {})
    x = one_hot(x_0, N)
    f_x = torch.stack([f(x, e, alpha_t, uniform) for e in range(N)])
    f_p = torch.stack([f(p, e, alpha_t, uniform) for e in range(N)])
    S = (f_x / f_x[z] * (f_p[z] * f_x / (f_p * f_x[z])).log()).sum()  # the term e = z_t is log 1 = 0
    bracket = {
        "printed": -(1 / f_p[z] - 1 / f_x[z] - S),
        "eq105": -(1 / f_x[z] - 1 / f_p[z] - S),
        "corrected": 1 / f_p[z] - 1 / f_x[z] + S,
    }[version]
    return bracket / (N * alpha_t)


# --- digits ---------------------------------------------------------------------------------------------------


def exact_softmax(logits: list[float], noise: Noise) -> list[mpmath.mpf]:
    """softmax without the absorbing rows; the logits are taken as exact numbers."""
    with mpmath.workdps(LIMIT_DIGITS):
        absorbing = noise.absorbing
        weight = [mpmath.mpf(0) if e in absorbing else mpmath.exp(v) for e, v in enumerate(logits)]
        total = mpmath.fsum(weight)
        return [w / total for w in weight]


def exact_kl(x_0: int, p: list, z: int, alpha_s, alpha_t, noise: Noise) -> mpmath.mpf:
    """Eqs. 2 and 4 with LIMIT_DIGITS digits; p is a list of N numbers, taken as exact. In nats."""
    with mpmath.workdps(LIMIT_DIGITS):
        N, k = noise.vocab_size, mpmath.mpf(noise.k)
        pi = [k / N + mpmath.mpf(noise.special.get(e, 0.0)) for e in range(N)]
        a_s, a_t = mpmath.mpf(alpha_s), mpmath.mpf(alpha_t)
        a_ts = mpmath.mpf(1) if a_s == a_t else a_t / a_s

        def q_s(x: list) -> list:
            at_s = [a_s * x[e] + (1 - a_s) * pi[e] for e in range(N)]
            return [at_s[e] * (a_ts * (e == z) + (1 - a_ts) * pi[z]) for e in range(N)]

        clean, noisy = q_s([mpmath.mpf(int(e == x_0)) for e in range(N)]), q_s([mpmath.mpf(v) for v in p])
        log_evidence = mpmath.log(mpmath.fsum(clean) / mpmath.fsum(noisy))
        parts = [a * (mpmath.log(a / b) - log_evidence) for a, b in zip(clean, noisy, strict=True) if a > 0]
        return mpmath.fsum(parts) / mpmath.fsum(clean)


def exact_objective(x_0: int, p: list, z: int, alpha_t, d_alpha_t, noise: Noise) -> mpmath.mpf:
    """Integrand of Eq. 15 as a difference quotient: -alpha'_t KL(alpha_s, alpha_t) / (alpha_s - alpha_t).

    Eqs. 12 to 14 are not used, so it also holds for several special tokens and for a special token as x_0.
    """
    with mpmath.workdps(LIMIT_DIGITS):
        step = mpmath.mpf(10) ** -LIMIT_STEP
        a_t = mpmath.mpf(alpha_t)
        if a_t == 1:  # no time before it: the limit from the noisy side
            a_t = 1 - step
        return -mpmath.mpf(d_alpha_t) * exact_kl(x_0, p, z, a_t + step, a_t, noise) / step


def exact_braces(x_0: int, p: list, z: int, alpha, B, noise: Noise) -> mpmath.mpf:
    """w [rho(alpha w) - rho(B alpha w)] + H, the braces of both rearranged losses (docs/equations.md, "Derivation").

    p must be mpmath numbers that sum to 1, and k + sum mu_i must be 1, to the digits asked for; k > 0.
    """
    N, k, a = noise.vocab_size, mpmath.mpf(noise.k), mpmath.mpf(alpha)
    r = [k / N + mpmath.mpf(noise.special.get(e, 0)) for e in range(N)]

    def rho(y):
        return 1 - mpmath.log(1 + y) / y if y != 0 else mpmath.mpf(0)

    f_p = [a * p[e] + (1 - a) * r[e] for e in range(N)]
    w = ((x_0 == z) - p[z]) / f_p[z]
    u, u_0 = (1 - a) * k / N, (1 - a) * r[x_0]
    total = mpmath.fsum(p[e] * rho(a * p[e] / u) for e in range(N) if e not in noise.absorbing)
    H = mpmath.log((a + u_0) / f_p[x_0]) + total - rho(a / u_0)
    return w * (rho(a * w) - rho(B * a * w)) + H


# --- batches --------------------------------------------------------------------------------------------------


def rows(alpha: float | Tensor, batch: int) -> list[float]:
    """One signal rate per row from a scalar, (B,) or (B, 1)."""
    return torch.as_tensor(alpha, dtype=torch.float64).reshape(-1).expand(batch).tolist()


def batch_posterior(p_x0: Tensor, z_t: Tensor, alpha_s: Tensor, alpha_t: Tensor, noise: Noise) -> Tensor:
    """Eq. 2 for p_x0 (B, L, N) and z_t (B, L)."""
    (B, L), K = z_t.shape, noise.kernel()
    a_s, a_t = rows(alpha_s, B), rows(alpha_t, B)
    cells = [
        bayes_posterior(p_x0[b, i].double(), int(z_t[b, i]), a_s[b], a_t[b], K) for b in range(B) for i in range(L)
    ]
    return torch.stack(cells).reshape(B, L, -1)


def batch_kl(logits: Tensor, x_0: Tensor, z_t: Tensor, alpha_s: Tensor, alpha_t: Tensor, noise: Noise) -> Tensor:
    """Dense KL of Eq. 4 per token, (B, L) float64, differentiable in the logits."""
    B, L = z_t.shape
    p = clean_distribution(logits, noise)
    a_s, a_t = rows(alpha_s, B), rows(alpha_t, B)
    cells = [
        dense_kl(int(x_0[b, i]), p[b, i], int(z_t[b, i]), a_s[b], a_t[b], noise) for b in range(B) for i in range(L)
    ]
    return torch.stack(cells).reshape(B, L)


def batch_objective(
    logits: Tensor, x_0: Tensor, z_t: Tensor, alpha_t: Tensor, d_alpha_t: Tensor, noise: Noise
) -> Tensor:
    """Eqs. 14 and 15 as printed, per token, (B, L) float64, differentiable in the logits."""
    B, L = z_t.shape
    p = clean_distribution(logits, noise)
    a, d = rows(alpha_t, B), rows(d_alpha_t, B)
    cells = [objective(int(x_0[b, i]), p[b, i], int(z_t[b, i]), a[b], d[b], noise) for b in range(B) for i in range(L)]
    return torch.stack(cells).reshape(B, L)


def draw_forward(x_0: Tensor, alpha_t: Tensor, noise: Noise, generator: torch.Generator) -> Tensor:
    """z_t ~ Cat(Q_t^T x_0) from the dense rows, (B, L)."""
    (B, L), K = x_0.shape, noise.kernel()
    a = rows(alpha_t, B)
    probs = torch.stack([transition(a[b], K)[x_0[b]] for b in range(B)])
    return torch.multinomial(probs.reshape(B * L, -1), 1, generator=generator).reshape(B, L)


# --- frequencies ----------------------------------------------------------------------------------------------


def chi_square_p_value(counts: Tensor, probs: Tensor) -> float:
    """Pearson's goodness of fit: the chance of a statistic this large when `counts` ~ Multinomial(probs).

    Tokens of probability zero must have no count (the value is then 0.0); tokens expected fewer than five
    times are pooled into one cell, so that the chi-square law applies.
    """
    counts, probs = counts.double().reshape(-1), probs.double().reshape(-1)
    if counts[probs == 0].sum() > 0:
        return 0.0
    expected = probs * counts.sum()
    common = expected >= 5
    observed = torch.cat([counts[common], counts[~common].sum()[None]])
    expected = torch.cat([expected[common], expected[~common].sum()[None]])
    cells = expected > 1e-9 * counts.sum()
    observed, expected = observed[cells], expected[cells]
    if len(observed) < 2:
        return 1.0
    statistic = float(((observed - expected) ** 2 / expected).sum())
    return float(mpmath.gammainc((len(observed) - 1) / 2, statistic / 2, mpmath.inf, regularized=True))


def binomial_bound(count: int, trials: int, prob: float) -> float:
    """Chernoff's bound on the chance that Binomial(trials, prob) falls as far out as `count`, either way.

    2 exp(-n KL(count/n || prob)) is never below the exact two-sided chance, so a test that rejects when it is
    under a rejects the right law with probability at most a.
    """
    rate = count / trials
    terms = [a * math.log(a / b) if b > 0 else math.inf for a, b in ((rate, prob), (1 - rate, 1 - prob)) if a > 0]
    return min(1.0, 2 * math.exp(-trials * sum(terms)))


# --- cases ----------------------------------------------------------------------------------------------------

MIXING_RATIOS = (0.0, 1e-3, 0.1, 0.5, 0.9, 1.0)
VOCABULARY = 7
MASK_IDS = (0, VOCABULARY // 2, VOCABULARY - 1)  # first, middle, last row


class Case(NamedTuple):
    """One random batch: logits (B, L, N) float64, ids (B, L), one pair of times per row."""

    noise: Noise
    k: float
    m: int
    logits: Tensor
    x_0: Tensor
    z_t: Tensor
    s: Tensor
    t: Tensor


def draw_case(k: float, m: int, seed: int = 0, length: int = 5, scale: float = 2.0) -> Case:
    """Clean text without [MASK], z_t from the dense forward process, times from 2 % to 98 % of the way."""
    N = VOCABULARY
    generator = torch.Generator().manual_seed(1000 * seed + 17 * m + round(100 * k))
    t = torch.tensor([0.02, 0.3, 0.7, 0.98], dtype=torch.float64)
    s = t * torch.tensor([0.5, 0.9, 0.1, 0.99], dtype=torch.float64)
    x_0 = torch.randint(0, N - 1, (len(t), length), generator=generator)
    x_0 = x_0 + (x_0 >= m)
    noise = Noise.mixing(N, k, m)
    z_t = draw_forward(x_0, 1 - t, noise, generator)
    logits = scale * torch.randn(len(t), length, N, dtype=torch.float64, generator=generator)
    return Case(noise, k, m, logits, x_0, z_t, s, t)
