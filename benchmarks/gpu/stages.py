"""The stages of `run`: each measures on the GPU, if there is one, and writes STAGE.json with tables.

python benchmarks/gpu/stages.py STAGE FOLDER [--small]
"""

import argparse
import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.profiler import ProfilerActivity, profile

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
from measure import interleaved_seconds, machine, peak_bytes  # noqa: E402

from xdlm_hf import LLaDAConfig, LLaDAForDiffusionLM, NoiseKernel  # noqa: E402
from xdlm_hf.diffusion.objective import limit_terms  # noqa: E402
from xdlm_hf.diffusion.ops import kernels, rows  # noqa: E402
from xdlm_hf.training.batch_loss import weighted_loss  # noqa: E402
from xdlm_hf.training.metrics import flops_per_token, peak_tflops  # noqa: E402
from xdlm_hf.training.planning import LAYOUTS, Run, activation_bytes, count_parameters, loss_bytes  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CONFIG = ROOT / "recipes" / "configs" / "models" / "llada_8b.json"
SMALL = {"d_model": 64, "n_heads": 4, "n_kv_heads": 4, "n_layers": 2, "mlp_hidden_size": 128, "vocab_size": 600}
SMALL |= {"embedding_size": 600, "mask_token_id": 599, "eos_token_id": 1, "pad_token_id": 1}
GIB = 2**30
SYNCS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "aten::_local_scalar_dense")


def table(title: str, columns: list[str], lines: list[list[Any]]) -> dict[str, Any]:
    return {"title": title, "columns": columns, "rows": lines}


# --------------------------------------------------------------------------------------------------------------------
# Environment and tests


def environment(folder: Path, small: bool) -> list[dict[str, Any]]:
    size, width = (2**20, 256) if small else (2**30, 8192)
    source, target = (torch.empty(size, dtype=torch.bfloat16, device=DEVICE) for _ in range(2))
    a, b = (torch.randn(width, width, dtype=torch.bfloat16, device=DEVICE) for _ in range(2))
    work = {"copy": lambda: target.copy_(source), "product": lambda: a @ b}
    seconds = interleaved_seconds(work, 10)
    versions = {name: find_version(name) for name in ("triton", "bitsandbytes", "flash_attn", "deepspeed")}
    facts = {
        "machine": machine(),
        "transformers": transformers.__version__,
        **versions,
        "copy, GB/s": f"{2 * source.nbytes / seconds['copy'] / 1e9:.0f}",
        "bfloat16 products, TFLOP/s": f"{2 * width**3 / seconds['product'] / 1e12:.0f}",
    }
    return [table("The machine", ["", ""], [[name, value] for name, value in facts.items()])]


def find_version(name: str) -> str:
    return importlib.import_module(name).__version__ if importlib.util.find_spec(name) else "absent"


def tests(folder: Path, small: bool) -> list[dict[str, Any]]:
    """Fails if a test does."""
    command = [sys.executable, "-m", "pytest", "-q", "--override-ini", "addopts=", "-p", "no:cacheprovider", "-rs"]
    runs = [
        ["tests/test_gpu.py", "tests/diffusion/test_triton_rows.py"],
        ["tests/generation/test_cache.py", "-m", "gpu"],
    ]
    lines = []
    for arguments in runs[: 1 if small else 2]:
        finished = subprocess.run([*command, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
        print(finished.stdout, finished.stderr)
        lines.append([" ".join(arguments), finished.stdout.strip().splitlines()[-1].strip("= ")])
        if finished.returncode:
            raise SystemExit(1)
    return [table("Tests", ["", ""], lines)]


# --------------------------------------------------------------------------------------------------------------------
# Loss


def loss(folder: Path, small: bool) -> list[dict[str, Any]]:
    """The two passes over given logits, eager and by kernels; a byte per logit is the time over that of a copy."""
    tokens, n = (64, 600) if small else (2048, 126464)
    kernel, generator = NoiseKernel(n, 0.1, n - 1), torch.Generator().manual_seed(0)
    x_0 = torch.randint(n - 1, (4, tokens // 4), generator=generator)
    alpha = torch.tensor([0.8, 0.6, 0.4, 0.2])
    z_t = kernel.corrupt(x_0, alpha, generator)
    terms = limit_terms(*(x.to(DEVICE) for x in (x_0, z_t, alpha, -torch.ones(4))), kernel)
    logits = torch.randn(tokens, n, device=DEVICE).to(torch.bfloat16)
    weights = torch.ones(tokens, dtype=torch.float64, device=DEVICE)
    out = torch.empty_like(logits)
    found = rows.logit_statistics(logits, terms, kernel, True)
    scalars = rows.gradient_scalars(found, terms, kernel, weights, logits)

    def eager(work: Callable[[], object]) -> Callable[[], object]:
        def run() -> None:
            on, kernels._runs_on = kernels._runs_on, lambda device: False
            try:
                work()
            finally:
                kernels._runs_on = on

        return run

    statistics = lambda: rows.logit_statistics(logits, terms, kernel, True)  # noqa: E731
    gradients = lambda: rows.row_gradients(logits, out, scalars, kernel)  # noqa: E731
    work = {
        "copy of the logits": lambda: out.copy_(logits),
        "statistics, eager": eager(statistics),
        "statistics": statistics,
        "gradient, eager": eager(gradients),
        "gradient": gradients,
    }
    seconds = interleaved_seconds(work, 2 if small else 10)
    copied = seconds["copy of the logits"]
    lines = [
        [name, f"{1000 * s:.3f}", f"{4 * s / copied:.1f}", f"{peak_bytes(work[name]) / 1e6:.0f}"]
        for name, s in seconds.items()
    ]
    return [table(f"bfloat16 logits of {tokens} tokens, N = {n}", ["", "ms", "bytes per logit", "MB"], lines)]


# --------------------------------------------------------------------------------------------------------------------
# LLaDA-8B with random weights


def llada(small: bool) -> LLaDAForDiffusionLM:
    config = LLaDAConfig.from_dict({**json.loads(CONFIG.read_text()), **(SMALL if small else {})})
    config.mixing_ratio = 0.1
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(DEVICE):
            torch.manual_seed(0)
            return LLaDAForDiffusionLM(config)
    finally:
        torch.set_default_dtype(before)


def step(folder: Path, small: bool) -> list[dict[str, Any]]:
    """One row of 4,096 tokens with recomputed blocks and the fused loss."""
    length = 64 if small else 4096
    model = llada(small).train()
    model.gradient_checkpointing_enable()
    process = model.noise_process()
    x_0 = torch.randint(1000 if not small else 500, (1, length))
    t = torch.tensor([0.5])
    z_t = process.corrupt(x_0, t, torch.Generator().manual_seed(0))
    batch = {"input_ids": x_0, "z_t": z_t, "t": t, "token_weights": torch.ones(x_0.shape)}
    batch = {name: value.to(DEVICE) for name, value in batch.items()}
    optimizer, name = make_optimizer(model)

    def run() -> None:
        weighted_loss(model, process, batch, fused=True)[0].backward()
        if optimizer is not None:
            optimizer.step()
        model.zero_grad(set_to_none=False)

    run()  # gradients and the optimizer's states are there from now on
    states = torch.cuda.memory_allocated() if DEVICE.type == "cuda" else 0
    seconds = interleaved_seconds({"step": run}, 2 if small else 4)["step"]
    peak = peak_bytes(run)
    counts = count_parameters(model)
    plan = Run(model.config, counts, 1, length, bf16=True, checkpointing=True, fused_loss=True)
    flops = flops_per_token(model, length) * length
    tflops = peak_tflops(DEVICE)
    layout = LAYOUTS["zero1"]  # 16-bit weights and gradients
    planned = activation_bytes(plan, layout) + loss_bytes(plan, layout)
    lines = [
        ["parameters", f"{counts.total / 1e9:.2f}e9"],
        ["optimizer", name],
        ["seconds", f"{seconds:.3f}"],
        ["tokens/s", f"{length / seconds:.0f}"],
        ["model FLOP utilization", "-" if tflops is None else f"{flops / seconds / tflops / 1e12:.3f}"],
        ["weights, gradients, states, GiB", f"{states / GIB:.2f}"],
        ["activations and loss, measured, GiB", f"{peak / GIB:.3f}"],
        ["activations and loss, planned, GiB", f"{planned / GIB:.3f}"],
    ]
    return [table(f"A training step of {length} tokens", ["", ""], lines)]


def make_optimizer(model: LLaDAForDiffusionLM) -> tuple[torch.optim.Optimizer | None, str]:
    if DEVICE.type == "cpu" or importlib.util.find_spec("bitsandbytes") is None:
        return None, "none"
    import bitsandbytes

    return bitsandbytes.optim.AdamW8bit(model.parameters(), lr=1e-6), "8-bit AdamW"


def generation(folder: Path, small: bool) -> list[dict[str, Any]]:
    prompt_length, new, steps = (16, 16, 8) if small else (512, 256, 32)
    model = llada(small).eval()
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    everywhere = {"steps": steps, "max_new_tokens": new, "eos_token_id": [], "return_dict_in_generate": True}
    in_blocks = {"block_length": new // 8}
    settings = {
        "no cache": {},
        "prefix": {**in_blocks, "cache": "prefix"},
        "dual": {**in_blocks, "cache": {"mode": "dual", "refresh": 4}},
        "threshold, all accepted": {**in_blocks, "parallel_decoding": {"threshold": 1e-9}},
        "prefix, threshold, all accepted": {**in_blocks, "cache": "prefix", "parallel_decoding": {"threshold": 1e-9}},
    }
    # As many as a model keeps graphs for, so that only the warm-up round captures.
    for name in ("no cache", "prefix", "dual", "prefix, threshold, all accepted"):
        settings[f"{name}, graphs"] = {**settings[name], "compile": "graphs"}
    lines = []
    for batch in (1, 8):
        prompt = torch.randint(500, (batch, prompt_length), device=DEVICE)
        outputs: dict[str, Any] = {}

        def run(name: str, prompt: torch.Tensor = prompt, outputs: dict[str, Any] = outputs) -> None:
            outputs[name] = model.generate(prompt, **everywhere, **settings[name])

        seconds = interleaved_seconds({name: partial(run, name) for name in settings}, 1 if small else 2)
        for name, s in seconds.items():
            passes = outputs[name].num_forward_passes
            syncs = host_syncs(partial(run, name)) / passes
            lines.append(
                [f"batch {batch}, {name}", passes, f"{1000 * s / passes:.2f}", f"{batch * new / s:.0f}", f"{syncs:.1f}"]
            )
    flops = 2 * weights / 2 * (prompt_length + new)
    tflops, bandwidth = peak_tflops(DEVICE), copy_bandwidth(folder)
    bounds = [
        ["whole pass at the peak, ms", "-" if tflops is None else f"{flops / tflops / 1e9:.1f}"],
        ["weights read once, ms", "-" if bandwidth is None else f"{1000 * weights / bandwidth:.1f}"],
    ]
    title = f"{prompt_length} + {new} tokens, {steps} steps, {weights / GIB:.1f} GiB of weights"
    columns = ["", "passes", "ms a pass", "tokens/s", "host syncs a pass"]
    return [table(title, columns, lines), table("Bounds of batch 1", ["", ""], bounds)]


def host_syncs(run: Callable[[], object]) -> int:
    """How often the host waits for the device."""
    with profile(
        activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if DEVICE.type == "cuda" else [])]
    ) as trace:
        run()
    return sum(event.count for event in trace.key_averages() if event.key in SYNCS)


def copy_bandwidth(folder: Path) -> float | None:
    """Bytes a second as the environment stage measured them."""
    path = folder / "environment.json"
    if not path.exists():
        return None
    facts = dict(json.loads(path.read_text())["tables"][0]["rows"])
    return float(facts["copy, GB/s"]) * 1e9


# --------------------------------------------------------------------------------------------------------------------
# Text


def text(folder: Path, small: bool) -> list[dict[str, Any]]:
    command = [sys.executable, str(ROOT / "benchmarks" / "text_efficiency.py")]
    command += ["--repeats", "1"] if small else ["--paper", "--repeats", "3"]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    print(finished.stdout, finished.stderr)
    if finished.returncode:
        raise SystemExit(finished.returncode)
    cells = [re.split(r"\s*│\s*", line.strip("│ \n")) for line in finished.stdout.splitlines() if line.startswith("│")]
    columns = ["", "tokens/s", "time", "1000 MiB", "memory", "(B, L, N) float32"]
    return [table(finished.stdout.splitlines()[0], columns, cells)]


STAGES = {stage.__name__: stage for stage in (environment, tests, loss, step, generation, text)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--small", action="store_true")
    options = parser.parse_args()
    result = {"tables": STAGES[options.stage](options.folder, options.small), "machine": machine()}
    path = options.folder / f"{options.stage}.json"
    path.with_suffix(".tmp").write_text(json.dumps(result, indent=1) + "\n")
    path.with_suffix(".tmp").rename(path)


if __name__ == "__main__":
    main()
