"""What the image systems cost: codes made once or in every step, guidance in one batch or two, memory of a step.

    python benchmarks/images_cost.py                            the paper's ImageNet sizes (a GPU)
    python benchmarks/images_cost.py --batch 1 --threads 1 --cpu-time     on a CPU, some minutes

DiT of 118 M parameters on 256 codes, N = 16,387, and LlamaGen's tokenizer of 72 M parameters, with random weights.
Three comparisons, of medians of interleaved runs:

    training      a step on cached codes, and one that also encodes its images of 256 x 256, as the released code does
    guidance      a step of sampling with `class_labels` and `cfg_scale`, whose two streams are one batch, and the two
                  streams one after the other
    memory        of such a step, beyond the weights, in tensors of (B, L, N) float32
"""

import argparse
import time

import torch
from diffusers import VQModel
from measure import interleaved_seconds, machine, peak_bytes
from rich.console import Console

from xdlm_hf.data.images import VQCodes
from xdlm_hf.models.dit.configuration_dit import DiTConfig
from xdlm_hf.models.dit.modeling_dit import DiTForDiffusionLM
from xdlm_hf.training.batch_loss import weighted_loss

LENGTH, CODES, ROWS = 256, 16384, 16387
VQ16 = {
    "down_block_types": ("DownEncoderBlock2D",) * 4 + ("AttnDownEncoderBlock2D",),
    "up_block_types": ("AttnUpDecoderBlock2D",) + ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 128, 256, 256, 512),
    "layers_per_block": 2,
    "latent_channels": 256,
    "vq_embed_dim": 8,
    "num_vq_embeddings": CODES,
    "lookup_from_codebook": True,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--cpu-time", action="store_true", help="time of this process instead of the clock's")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    clock = time.process_time if options.cpu_time else time.perf_counter
    device = "cuda" if torch.cuda.is_available() else "cpu"
    console = Console()
    console.print(machine())
    config = DiTConfig(model_length=LENGTH, vocab_size=ROWS, mask_token_id=CODES, num_classes=1000, mixing_ratio=0.1)
    torch.manual_seed(0)
    model = DiTForDiffusionLM(config).to(device)
    for title, candidates in (
        ("training step", training(model, options.batch, device)),
        ("guided step", guidance(model, options.batch, device)),
    ):
        seconds = interleaved_seconds(candidates, options.rounds, clock)
        first = next(iter(seconds.values()))
        for name, value in seconds.items():
            console.print(f"{title}, {name}: {value:.3f} s, {value / first:.2f} of the first")
    guided = guidance(model, options.batch, device)["one batch"]
    unit = options.batch * LENGTH * ROWS * 4
    console.print(f"guided step, peak memory: {peak_bytes(guided) / unit:.2f} tensors of (B, L, N) float32")


def training(model: DiTForDiffusionLM, batch: int, device: str) -> dict:
    """Loss and gradients of a batch, whose codes are given or made by the tokenizer."""
    tokenizer = VQCodes(VQModel(**VQ16).to(device).eval())
    images = torch.randint(0, 256, (batch, 3, 256, 256), dtype=torch.uint8, device=device)
    process, t = model.noise_process(), torch.linspace(0.1, 0.9, batch, dtype=torch.float64, device=device)
    codes = tokenizer.encode(images)
    labels = torch.arange(batch, device=device)

    def step(x_0: torch.Tensor) -> None:
        model.train()
        z_t = process.corrupt(x_0, t)
        rows = {"input_ids": x_0, "z_t": z_t, "t": t, "token_weights": torch.ones_like(x_0, dtype=torch.float32)}
        total, _ = weighted_loss(model, process, {**rows, "class_labels": labels}, fused=True)
        total.backward()
        model.zero_grad()

    return {"cached codes": lambda: step(codes), "codes made in the step": lambda: step(tokenizer.encode(images))}


def guidance(model: DiTForDiffusionLM, batch: int, device: str) -> dict:
    """One step from the prior, with logits of nearly all positions; two passes are two calls without guidance."""
    common = {"steps": 1, "max_new_tokens": LENGTH, "seed": 0}
    labels, null = [0] * batch, [model.num_classes] * batch

    def one_batch() -> None:
        model.eval().generate(class_labels=labels, cfg_scale=2.0, **common)

    def two_passes() -> None:
        for classes in (labels, null):
            model.eval().generate(class_labels=classes, **common)

    def unguided() -> None:
        model.eval().generate(class_labels=labels, **common)

    return {"one batch": one_batch, "two passes": two_passes, "without guidance": unguided}


if __name__ == "__main__":
    main()
