"""Generation against a plain restatement of the released loops: time and memory, as ratios.

    python benchmarks/generation.py                     every table, on the GPU if any (10 minutes on 2 cores)
    python benchmarks/generation.py --only step         the samplers alone, logits given
    python benchmarks/generation.py --only generate     whole `generate` on a model of 45 million parameters
    python benchmarks/generation.py --only gumbel       what float32 Gumbel noise does to rare tokens
    python benchmarks/generation.py --checkpoint PATH   `generate` on a checkpoint instead: how well its caches agree

The baselines do what the released code does: logits of the whole sequence, a whole softmax, float64 Gumbel noise over
(B, L, N) when drawing, a Python loop over rows; and for ancestral sampling the dense posterior with Gumbel-max. Memory
is what a call allocates at most beyond what it is given. Targets in brackets.
"""

import argparse
from collections.abc import Callable

import torch
from measure import interleaved_seconds, machine, peak_bytes
from torch import Tensor

from xdlm_hf import LLaDAConfig, LLaDAForDiffusionLM, NoiseKernel, StationaryProcess, posterior, sample_posterior
from xdlm_hf.diffusion.reverse import begin_step, finish_step, stationary_step
from xdlm_hf.diffusion.schedules import LinearSchedule
from xdlm_hf.generation.confidence import ConfidenceSampler, ConfidenceSettings
from xdlm_hf.generation.network import chunk_slices
from xdlm_hf.generation.released import ReferenceAncestralSampler

N, MASK, K, NEW = 126464, 126336, 0.1, 256
TIMES = (1.0, 0.75, 0.5, 0.25)  # over which ancestral steps are averaged


def gumbel_argmax(logits: Tensor, temperature: float) -> Tensor:
    """The released draw: argmax of exp(l) / (-log u)^T with float64 noise of the logits' shape."""
    if temperature == 0:
        return logits.argmax(-1)
    wide = logits.double()
    return (wide.exp() / (-torch.rand_like(wide).log()) ** temperature).argmax(-1)


def released_step(ids: Tensor, logits: Tensor, block_end: int, fill: int, edits: int, temperature: float) -> Tensor:
    """One step on the whole sequence: fill the surest holes before `block_end`, edit the surest disagreements."""
    predicted = gumbel_argmax(logits, temperature)
    p = logits.softmax(-1)
    sure = p.gather(-1, predicted[..., None]).squeeze(-1)
    current = p.gather(-1, ids[..., None]).squeeze(-1)
    holes = ids == MASK
    holes[:, block_end:] = False
    differs = (ids != MASK) & (predicted != ids) & (sure >= current)
    ids = ids.clone()
    for row in range(len(ids)):
        chosen = torch.where(holes[row], sure[row], -torch.inf).topk(fill).indices
        ids[row, chosen] = predicted[row, chosen]
        if edits:
            chosen = torch.where(differs[row], sure[row], -torch.inf).topk(min(edits, int(differs[row].sum()))).indices
            ids[row, chosen] = predicted[row, chosen]
    return ids


def released_generate(model: LLaDAForDiffusionLM, prompt: Tensor, steps: int, block_length: int) -> Tensor:
    """The released loop at temperature 0, k = 0.1, one token's budget carried from step to step."""
    ids = torch.nn.functional.pad(prompt, (0, NEW), value=MASK)
    per_block = steps * block_length // NEW
    done = 0
    for i in range(steps):
        block_end = prompt.shape[1] + (i // per_block + 1) * block_length
        logits = model(ids).logits
        edits = int(K / (1 - K) * (i + 1) * NEW / steps) - done if i else 0
        ids = released_step(ids, logits, block_end, NEW // steps, edits, 0.0)
        done += edits
    return ids


def dense_ancestral(logits: Tensor, z_t: Tensor, alpha_s: Tensor, alpha_t: Tensor, kernel: NoiseKernel) -> Tensor:
    """The released ancestral step: dense posterior, float32 Gumbel-max."""
    masked = logits.float()
    masked[..., MASK] = -torch.inf
    probs = posterior(masked.softmax(-1), z_t, alpha_s, alpha_t, kernel)
    return (probs / (1e-10 - (torch.rand_like(probs) + 1e-10).log())).argmax(-1)


def lazy_head_step(
    hidden: Tensor, head: Tensor, z_t: Tensor, alpha_s: Tensor, alpha_t: Tensor, kernel: NoiseKernel
) -> Tensor:
    """The ancestral step of `generate`: runs the output layer only where z_s depends on p."""
    draw = begin_step(z_t, stationary_step(z_t, alpha_s[:, None], alpha_t[:, None], kernel))
    kept = hidden[draw.needs_p]
    slices = chunk_slices(len(kept), len(head), kept.device)
    return finish_step(draw, (kept[part] @ head.T for part in slices))


def table(title: str, candidates: dict[str, Callable[[], object]], given: int, goal: str, repeats: int) -> None:
    """Print a comparison; the first candidate is the baseline, memory is relative to the `given` bytes."""
    seconds = interleaved_seconds(candidates, repeats)
    memory = {name: peak_bytes(run) for name, run in candidates.items()}
    base = next(iter(candidates))
    print(f"\n{title}  {goal}\n  {'':34} {'s':>8} {'time':>8} {'MB':>9} {'of it':>7} {'of logits':>9}")
    for name in candidates:
        row = f"  {name:34} {seconds[name]:8.4f} {seconds[name] / seconds[base]:8.4f} {memory[name] / 1e6:9.1f}"
        print(f"{row} {memory[name] / memory[base]:7.3f} {memory[name] / given:9.3f}", flush=True)


def ancestral(device: str, dtype: torch.dtype, repeats: int) -> None:
    """Ancestral steps at 32 steps, averaged over times."""
    kernel = NoiseKernel(N, K, MASK)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, NEW, N, generator=generator).to(device, dtype).mul_(3)
    hidden = torch.randn(1, NEW, 1024, generator=generator).to(device, dtype)
    head = torch.randn(N, 1024, generator=generator).to(device, dtype).mul_(1024**-0.5)
    x_0 = torch.randint(0, N - 200, (1, NEW), generator=generator)
    steps = []
    for t in TIMES:
        alpha_t = torch.tensor([1 - t])
        z_t = kernel.corrupt(x_0, alpha_t, generator)
        steps.append((z_t.to(device), (alpha_t + 1 / 32).to(device), alpha_t.to(device), kernel))

    def over_times(step: Callable[..., Tensor]) -> Callable[[], None]:
        return lambda: [step(*arguments) for arguments in steps] and None

    table(
        f"ancestral step, logits given ({str(dtype)[6:]}), mean over t = {TIMES}, 32 steps",
        {
            "dense posterior, Gumbel-max": over_times(lambda *a: dense_ancestral(logits, *a)),
            "ours": over_times(lambda *a: sample_posterior(logits, *a)),
        },
        logits.nbytes,
        "[time 0.03, memory 0.03 of the logits]",
        repeats,
    )
    table(
        "head (width 1024) + ancestral step",
        {
            "whole head, dense step": over_times(lambda *a: dense_ancestral(hidden @ head.T, *a)),
            "ours: head where p decides": over_times(lambda *a: lazy_head_step(hidden, head, *a)),
            "the head's product alone": over_times(lambda *a: hidden @ head.T),
        },
        logits.nbytes,
        "[time 0.15, memory 0.03 of the baseline, time below the product's]",
        repeats,
    )


def confidence(device: str, repeats: int) -> None:
    """Confidence sampler without the forward pass: bf16 logits of prompt and 256 new positions."""
    for prompt, temperature, goal in (
        (0, 0.0, "[time 0.35, memory 0.03 of the logits]"),
        (256, 0.0, "[time 0.17]"),
        (0, 0.7, "[time 0.07, memory 0.15 of the logits]"),
    ):
        generator = torch.Generator().manual_seed(0)
        length = prompt + NEW
        logits = torch.randn(1, length, N, generator=generator).mul_(3).to(device, torch.bfloat16)
        sampler = ConfidenceSampler(ConfidenceSettings(MASK, K, 32, temperature=temperature), prompt, NEW)
        ids = torch.zeros(1, length, dtype=torch.long, device=device)
        canvas = sampler.begin(ids, (torch.arange(length, device=device) >= prompt)[None])
        filled = canvas.holes & (torch.rand(1, length, generator=generator).to(device) < 0.5)
        start = {"ids": torch.where(filled, 5, canvas.ids), "holes": canvas.holes & ~filled}
        canvas = type(canvas)(**{**vars(canvas), **start})

        def ours(sampler=sampler, canvas=canvas, logits=logits, prompt=prompt):
            return sampler.step(canvas, logits[:, prompt:], sampler.request(canvas, 16))

        def released(canvas=canvas, logits=logits, length=length, temperature=temperature):
            return released_step(canvas.ids, logits, length, 8, 2, temperature)

        table(
            f"confidence step, bf16 logits, prompt {prompt}, temperature {temperature}",
            {"released": released, "ours": ours},
            logits.nbytes,
            goal,
            repeats,
        )


def build_model(device: str, checkpoint: str | None) -> LLaDAForDiffusionLM:
    if checkpoint is not None:
        return LLaDAForDiffusionLM.from_pretrained(checkpoint).eval().to(device)
    torch.manual_seed(0)
    config = LLaDAConfig(
        vocab_size=N,
        embedding_size=N,
        d_model=256,
        n_heads=8,
        n_kv_heads=8,
        n_layers=12,
        mlp_hidden_size=1024,
        max_sequence_length=1024,
        mask_token_id=MASK,
        eos_token_id=126081,
        pad_token_id=126081,
        weight_tying=True,
    )
    return LLaDAForDiffusionLM(config).eval().to(device)


def whole(device: str, repeats: int, checkpoint: str | None) -> None:
    """`generate` with and without caches: time, agreement with the uncached answer, forward passes."""
    model = build_model(device, checkpoint)
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    longest = model.config.max_sequence_length
    new, prompt_length = (NEW, 512) if longest >= NEW + 512 else (longest // 2, longest // 4)
    prompt = torch.randint(
        0, model.config.mask_token_id, (1, prompt_length), generator=torch.Generator().manual_seed(1)
    )
    common = {
        "max_new_tokens": new,
        "steps": 32,
        "mixing_ratio": K,
        "eos_token_id": [],
        "return_dict_in_generate": True,
    }
    settings = {
        "no cache": ({}, "[0.75]"),
        "prefix": ({"use_cache": "prefix"}, "[0.45]"),
        "prefix, refreshed every 8": ({"use_cache": "prefix", "cache_refresh": 8}, ""),
        "blocks of 32": ({"block_length": new // 8}, ""),
        "blocks of 32, dual": ({"block_length": new // 8, "use_cache": "dual"}, ""),
        "blocks of 32, dual, threshold 0.9": (
            {"block_length": new // 8, "use_cache": "dual", "confidence_threshold": 0.9},
            "[0.25]",
        ),
    }
    prompt = prompt.to(device)
    answers = {name: model.generate(prompt, **common, **more) for name, (more, _) in settings.items()}
    candidates: dict[str, Callable[[], object]] = {}
    if checkpoint is None:
        candidates["released loop"] = torch.no_grad()(lambda: released_generate(model, prompt, 32, NEW))
    for name, (more, _) in settings.items():
        candidates[name] = lambda more=more: model.generate(prompt, **common, **more)
    seconds = interleaved_seconds(candidates, repeats)
    base = next(iter(candidates))
    print(f"\ngenerate, {millions:.0f} M parameters, prompt {prompt_length}, {new} new tokens, 32 steps, k = {K}")
    print(f"  {'':34} {'s':>8} {'time':>8} {'passes':>7} {'agrees':>7}  target")
    for name in candidates:
        row = f"  {name:34} {seconds[name]:8.3f} {seconds[name] / seconds[base]:8.3f}"
        if name in answers:
            plain = answers["blocks of 32" if name.startswith("blocks") else "no cache"]
            same = (answers[name].sequences == plain.sequences)[:, prompt_length:].float().mean().item()
            row += f" {answers[name].num_forward_passes:7d} {same:7.3f}  {settings[name][1]}"
        print(row, flush=True)


def gumbel(draws: int) -> None:
    """Share of tokens drawn from the uniform part: exact, our sampler's, and with the released float32 noise."""
    kernel = NoiseKernel(N, K, MASK)
    rows = 64
    print("\nuniform part of the ancestral step at t = 0.5, a clean token certain: share of tokens drawn")
    for steps in (32, 256):
        alpha_t, alpha_s = torch.tensor([0.5]), torch.tensor([0.5 + 1 / steps])
        logits = torch.full((1, rows, N), -40.0)
        logits[..., 7] = 40.0
        z_t = torch.full((1, rows), MASK)
        exact = posterior(logits[:, :1].double().softmax(-1), z_t[:, :1], alpha_s, alpha_t, kernel)[0, 0]
        share = 1 - exact[7] - exact[MASK]

        def rare(z_s: Tensor) -> int:
            return int(((z_s != 7) & (z_s != MASK)).sum())

        released = ReferenceAncestralSampler(StationaryProcess(kernel, LinearSchedule()), 2 * steps, 0, rows)
        canvas = released.begin(z_t, torch.ones_like(z_t, dtype=torch.bool))
        canvas = type(canvas)(**{**vars(canvas), "ids": z_t})
        released.times = lambda i, rates=(alpha_s, alpha_t): tuple(1 - rate.view(1, 1).double() for rate in rates)
        rounds = range(draws // rows)
        ours = sum(rare(sample_posterior(logits, z_t, alpha_s, alpha_t, kernel)) for _ in rounds)
        theirs = sum(rare(released.step(canvas, [logits[0]], released.request(canvas, 0)).ids) for _ in rounds)
        total = len(rounds) * rows
        error = (share * (1 - share) / total).sqrt()
        print(
            f"  {steps:4d} steps: exact {share:.6f}, ours {ours / total:.6f}, float32 Gumbel {theirs / total:.6f} "
            f"(standard error {error:.6f}, {total} draws)",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help="rounds of every comparison; the median counts")
    parser.add_argument("--only", choices=("step", "generate", "gumbel"))
    parser.add_argument("--checkpoint", help="a checkpoint for `generate`, instead of random weights")
    parser.add_argument("--draws", type=int, default=8192, help="for the frequencies")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(f"{machine()}, medians of {options.repeats}")
    torch.manual_seed(0)
    if options.only in (None, "step") and options.checkpoint is None:
        for dtype in (torch.float32, torch.bfloat16):
            ancestral(device, dtype, options.repeats)
        confidence(device, options.repeats)
    if options.only in (None, "generate"):
        whole(device, options.repeats, options.checkpoint)
    if options.only in (None, "gumbel") and options.checkpoint is None:
        gumbel(options.draws)


if __name__ == "__main__":
    main()
