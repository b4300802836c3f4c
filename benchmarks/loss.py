"""Peak memory and time of output layer and loss, as ratios to the same formula under plain autograd.

    python benchmarks/loss.py                  both shapes, on the GPU when there is one (2 minutes on 2 cores)
    python benchmarks/loss.py --threads 1 --cpu-time       on a shared machine

The baseline is Eq. 14 as printed (softmax, gathers, mean of logs) in float32 under autograd. `cross-entropy` is the
output layer with plain cross-entropy over all tokens, an upper bound for the cost of masked diffusion. Memory excludes
the gradients of head and hidden states, which every implementation must hold. Targets are in brackets.
"""

import argparse
import os
import time
from collections.abc import Callable

import torch
from measure import interleaved_seconds, machine, peak_bytes
from torch import Tensor
from torch.nn.functional import cross_entropy

from xdlm_hf import NoiseKernel, diffusion_loss, fused_linear_diffusion_loss

SHAPES = [(1024, 32768, 512, torch.float32), (256, 126464, 1024, torch.bfloat16)]  # tokens, N, width, dtype
K = 0.1


def dense_loss(logits: Tensor, x_0: Tensor, z_t: Tensor, alpha_t: Tensor, kernel: NoiseKernel) -> Tensor:
    """Eqs. 14, 15 for alpha'_t = -1 with dense tensors of vocabulary size, in float32 or wider."""
    n, m, k = kernel.vocab_size, kernel.mask_token_id, kernel.mixing_ratio
    logits = logits if logits.dtype == torch.float64 else logits.float()
    alpha = alpha_t[:, None].to(logits.dtype)
    beta, r = 1 - alpha, logits.new_full((n,), k / n)
    if k < 1:
        r[m] += 1 - k
        logits = logits.masked_fill(torch.arange(n, device=logits.device) == m, -torch.inf)
    p = logits.softmax(-1)
    f_p = alpha[..., None] * p + beta[..., None] * r
    x_z, r_z, r_0 = (z_t == x_0).to(p.dtype), r[z_t], r[x_0]
    f_x_z, f_x_0 = alpha * x_z + beta * r_z, alpha + beta * r_0
    f_p_z, f_p_0 = (f_p.gather(-1, ids[..., None]).squeeze(-1) for ids in (z_t, x_0))
    p_z = p.gather(-1, z_t[..., None]).squeeze(-1)
    # mean over e of log f_t(x, e), whose entries are beta r(e) but for e = x_0
    mean_log_f_x = (torch.log(beta[..., None] * r)).mean(-1) + (f_x_0 / (beta * r_0)).log() / n
    h = (x_z - p_z) / f_p_z - (f_x_z / f_p_z).log() / alpha + (f_x_0 / f_p_0).log()
    h = h + k * beta / alpha * (mean_log_f_x - f_p.log().mean(-1))
    return r_z / f_x_z * h


class Case:
    """Inputs of one shape, and the implementations to compare."""

    def __init__(self, tokens: int, n: int, width: int, dtype: torch.dtype, device: str):
        generator = torch.Generator().manual_seed(0)
        self.kernel = NoiseKernel(n, K, n - 1)
        x_0 = torch.randint(n - 1, (4, tokens // 4), generator=generator)
        alpha = torch.tensor([0.8, 0.6, 0.4, 0.2])
        self.x_0, self.z_t = x_0.to(device), self.kernel.corrupt(x_0, alpha, generator).to(device)
        self.alpha, self.slope = alpha.to(device), -torch.ones(4, device=device)
        hidden, weight = torch.randn(*x_0.shape, width, generator=generator), torch.randn(n, width, generator=generator)
        self.hidden = hidden.to(device, dtype).requires_grad_()
        self.weight = (weight * width**-0.5).to(device, dtype).requires_grad_()
        self.logits = (self.hidden @ self.weight.T).detach().requires_grad_()

    def ours(self, logits: Tensor) -> Tensor:
        return diffusion_loss(logits, self.x_0, self.z_t, self.alpha, self.slope, self.kernel)

    def dense(self, logits: Tensor) -> Tensor:
        return dense_loss(logits, self.x_0, self.z_t, self.alpha, self.kernel)

    def fused(self) -> Tensor:
        arguments = (self.x_0, self.z_t, self.alpha, self.slope, self.kernel)
        return fused_linear_diffusion_loss(self.hidden, self.weight, *arguments)[0]

    def cross_entropy(self) -> Tensor:
        logits = (self.hidden @ self.weight.T).flatten(0, 1)
        return cross_entropy(logits.float(), self.x_0.flatten(), reduction="sum")

    def error(self) -> float:
        """Largest difference from the dense formula in float64 on the same logits, four tokens a row, in nats."""
        part = self.logits.detach()[:, :4]
        x_0, z_t = self.x_0[:, :4], self.z_t[:, :4]
        dense = dense_loss(part.double(), x_0, z_t, self.alpha.double(), self.kernel)
        return (diffusion_loss(part, x_0, z_t, self.alpha, self.slope, self.kernel) - dense).abs().max().item()

    def comparisons(self) -> list[tuple[str, dict[str, Callable[[], object]], int]]:
        """(title, candidates, bytes of the gradients to exclude) of each table; the first candidate is the baseline."""

        def train(total: Callable[[], Tensor]) -> Callable[[], object]:
            return lambda: torch.autograd.grad(total(), (self.hidden, self.weight))

        def train_logits(loss: Callable[[Tensor], Tensor]) -> Callable[[], object]:
            return lambda: torch.autograd.grad(loss(self.logits).sum(), self.logits)

        linear = {
            "dense": train(lambda: self.dense(self.hidden @ self.weight.T).sum()),
            "ours": train(self.fused),
            "cross-entropy": train(self.cross_entropy),
        }
        given = {"dense": train_logits(self.dense), "ours": train_logits(self.ours)}
        forward = {name: torch.no_grad()(lambda loss=loss: loss(self.logits)) for name, loss in self.losses().items()}
        return [
            ("output layer + loss", linear, self.hidden.nbytes + self.weight.nbytes),
            ("loss, logits given", given, 0),
            ("loss, forward only", forward, 0),
        ]

    def losses(self) -> dict[str, Callable[[Tensor], Tensor]]:
        return {"dense": self.dense, "ours": self.ours}


def target(what: str, dtype: torch.dtype) -> str:
    given = 0.25 if dtype == torch.float32 else 0.165
    memory, seconds = {
        "output layer + loss": (0.05, 0.60),
        "loss, logits given": (given, 0.25),
        "loss, forward only": (0.02, 0.20),
    }[what]
    return f"[{memory}, {seconds}]"


def report(shape: tuple, repeats: int, device: str, clock: Callable[[], float]) -> None:
    tokens, n, width, dtype = shape
    case = Case(*shape, device)
    print(f"\n{tokens} tokens x {n} vocabulary x {width} width, {str(dtype).removeprefix('torch.')}, k = {K}")
    print(f"  largest error of the loss against float64: {case.error():.1e} nats")
    print(f"  {'':36} {'MB':>8} {'s':>8} {'memory':>8} {'time':>8}  target")
    for what, candidates, unavoidable in case.comparisons():
        load = os.getloadavg()[0]
        seconds = interleaved_seconds(candidates, repeats, clock)
        memory = {name: max(peak_bytes(run) - unavoidable, 0) for name, run in candidates.items()}
        for name in candidates:
            row = f"  {what + ': ' + name:36} {memory[name] / 1e6:8.1f} {seconds[name]:8.3f}"
            ratios = f" {memory[name] / memory['dense']:8.3f} {seconds[name] / seconds['dense']:8.3f}"
            print(row + ratios + (f"  {target(what, dtype)}" if name == "ours" else ""), flush=True)
        print(f"    load average {load:.1f} before, {os.getloadavg()[0]:.1f} after")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="rounds of every comparison; the median counts")
    parser.add_argument("--threads", type=int, help="CPU threads; default as PyTorch finds")
    parser.add_argument("--cpu-time", action="store_true", help="measure this process's CPU time, not wall time")
    parser.add_argument("--shape", type=int, choices=range(len(SHAPES)), help="only this one")
    options = parser.parse_args()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    clock = time.process_time if options.cpu_time else time.perf_counter
    print(f"{machine()}, {clock.__name__}, medians of {options.repeats}")
    for shape in SHAPES if options.shape is None else [SHAPES[options.shape]]:
        report(shape, options.repeats, device, clock)


if __name__ == "__main__":
    main()
