"""Throughput and memory of the text systems, as in the paper's Table 17, and what they cost beside the bare network.

    python benchmarks/text_efficiency.py            a small size, on the GPU when there is one (5 minutes on 2 cores)
    python benchmarks/text_efficiency.py --paper    the paper's: DiT of 170 M parameters, 32 x 1024 GPT-2 tokens (a GPU)
    python benchmarks/text_efficiency.py --threads 1 --cpu-time       on a shared machine

One network with random weights and random tokens, as in the released protocol. Three tables:

    forward             the loss without gradients, in evaluation mode
    forward, backward   the loss and its gradients, in training mode (dropout); `cross-entropy` is the same network with
                        plain cross-entropy over all tokens
    sampling            32 ancestral steps; "as released" is `reference_compat`, with one more pass, float32 Gumbel
                        noise for MDLM, XDLM, GIDD and float64 for UDLM; `network` is as many forward passes alone

Tokens per second, peak memory beyond what was there before, and ratios to the first line; all systems of a table run in
turn. Memory is also given in tensors of (B, L, N) float32, the unit of the published column (1.0, 4.0, 3.0 and 3.0 for
the forward pass of MDLM, GIDD, XDLM and UDLM).
"""

import argparse
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from measure import interleaved_seconds, machine, peak_bytes
from rich.console import Console
from rich.table import Table
from torch import Tensor

from xdlm_hf.diffusion.process import NoiseProcess
from xdlm_hf.models.dit.configuration_dit import DiTConfig
from xdlm_hf.models.dit.modeling_dit import DiTForDiffusionLM
from xdlm_hf.training.batch_loss import weighted_loss

STEPS = 32
SYSTEMS: dict[str, dict[str, Any]] = {
    "MDLM": {"mixing_ratio": 0.0},
    "XDLM k = 0.1": {"mixing_ratio": 0.1},
    "UDLM": {"mixing_ratio": 1.0},
    "GIDD": {"noise_process": "gidd", "p_uniform": 0.0},
}


@dataclass(frozen=True)
class Size:
    """B rows of L tokens, and sizes of the network."""

    rows: int
    length: int
    network: dict[str, Any]


SMALL = Size(8, 128, {"hidden_dim": 256, "n_blocks": 4, "n_heads": 4, "cond_dim": 128, "vocab_size": 8192})
PAPER = Size(32, 1024, {})  # the defaults of DiTConfig


class Systems:
    """The four systems on one network's weights, and the work to time."""

    def __init__(self, size: Size, device: torch.device):
        self.size, self.device = size, device
        config = DiTConfig(model_length=size.length, **size.network)
        torch.manual_seed(0)
        weights = DiTForDiffusionLM(config).state_dict()
        self.models: dict[str, DiTForDiffusionLM] = {}
        for name, noise in SYSTEMS.items():
            model = DiTForDiffusionLM(DiTConfig(model_length=size.length, **size.network, **noise))
            model.load_state_dict(weights)
            self.models[name] = model.to(device)
        self.vocab_size = config.vocab_size
        generator = torch.Generator().manual_seed(1)
        self.ids = torch.randint(config.vocab_size - 1, (size.rows, size.length), generator=generator)
        self.batches = {name: self._batch(model.noise_process()) for name, model in self.models.items()}

    def _batch(self, process: NoiseProcess) -> dict[str, Tensor]:
        """Noisy rows at stratified times."""
        t = (torch.arange(self.size.rows, dtype=torch.float64) + 0.5) / self.size.rows
        z_t = process.corrupt(self.ids, t, torch.Generator().manual_seed(2))
        batch = {"input_ids": self.ids, "z_t": z_t, "t": t, "token_weights": torch.ones(self.ids.shape)}
        return {name: value.to(self.device) for name, value in batch.items()}

    def loss(self, name: str) -> Tensor:
        model = self.models[name]
        with self._autocast():
            return weighted_loss(model, model.noise_process(), self.batches[name], fused=True)[0]

    def cross_entropy(self) -> Tensor:
        with self._autocast():
            logits = self.models["MDLM"](input_ids=self.batches["MDLM"]["z_t"]).logits
        return F.cross_entropy(logits.flatten(0, 1).float(), self.ids.to(self.device).flatten(), reduction="sum")

    def _autocast(self) -> torch.autocast:
        """bfloat16 inside on a GPU, as the release trains."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda")

    def forward(self) -> dict[str, Callable[[], object]]:
        def run(name: str) -> Callable[[], object]:
            return torch.no_grad()(lambda: self.loss(name))

        return {name: run(name) for name in SYSTEMS}

    def backward(self) -> dict[str, Callable[[], object]]:
        def run(model: DiTForDiffusionLM, loss: Callable[[], Tensor]) -> None:
            loss().backward()
            model.zero_grad()  # the gradients themselves are part of the memory, as in the release

        work = {name: lambda name=name: run(self.models[name], lambda: self.loss(name)) for name in SYSTEMS}
        return {**work, "cross-entropy": lambda: run(self.models["MDLM"], self.cross_entropy)}

    def sampling(self) -> dict[str, Callable[[], object]]:
        def generate(name: str, **options: Any) -> Callable[[], object]:
            common = {"steps": STEPS, "max_new_tokens": self.size.length, "num_return_sequences": self.size.rows}
            return lambda: self.models[name].generate(**common, eos_token_id=[], seed=0, **options)

        @torch.no_grad()
        def network() -> None:
            for _ in range(STEPS):
                self.models["MDLM"](input_ids=self.batches["MDLM"]["z_t"]).logits  # noqa: B018

        exact = {f"{name}, exact": generate(name) for name in SYSTEMS}
        released = {f"{name}, as released": generate(name, reference_compat=True) for name in SYSTEMS}
        return {"network": network, **exact, **released}

    def train(self, training: bool) -> None:
        for model in self.models.values():
            model.train(training)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--paper", action="store_true", help="the paper's size")
    parser.add_argument("--repeats", type=int, default=5, help="rounds of every comparison; the median counts")
    parser.add_argument("--threads", type=int, help="CPU threads; default as PyTorch finds")
    parser.add_argument("--cpu-time", action="store_true", help="measure this process's CPU time, not wall time")
    options = parser.parse_args()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    clock = time.process_time if options.cpu_time else time.perf_counter
    size = PAPER if options.paper else SMALL
    systems = Systems(size, device)
    parameters = systems.models["MDLM"].num_parameters()
    print(
        f"{machine()}, {clock.__name__}, medians of {options.repeats}; DiT of {parameters / 1e6:.1f} M parameters, "
        f"{size.rows} x {size.length} tokens, N = {systems.vocab_size}"
    )
    for title, training, candidates in (
        ("forward", False, systems.forward()),
        ("forward, backward", True, systems.backward()),
        (f"sampling, {STEPS} steps", False, systems.sampling()),
    ):
        systems.train(training)
        report(title, candidates, systems, options.repeats, clock)


def report(
    title: str,
    candidates: dict[str, Callable[[], object]],
    systems: Systems,
    repeats: int,
    clock: Callable[[], float],
) -> None:
    load = os.getloadavg()[0]
    seconds = interleaved_seconds(candidates, repeats, clock)
    memory = {name: peak_bytes(run) for name, run in candidates.items()}
    tokens = systems.ids.numel()
    unit = 4 * tokens * systems.vocab_size
    first = next(iter(candidates))
    table = Table(title=title, caption=f"load average {load:.1f} before, {os.getloadavg()[0]:.1f} after")
    for column in ("", "tokens/s", "time", "1000 MiB", "memory", "(B, L, N) float32"):
        table.add_column(column, justify="right" if column else "left")
    for name in candidates:
        table.add_row(
            name,
            f"{tokens / seconds[name]:,.0f}",
            f"{seconds[name] / seconds[first]:.3f}",
            f"{memory[name] / 2**20 / 1000:.4f}",
            f"{memory[name] / memory[first]:.3f}",
            f"{memory[name] / unit:.3f}",
        )
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
