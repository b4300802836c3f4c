"""Estimates for a training run before it starts: parameters, operations, and the memory of every GPU.

They are computed from the config and a model on torch's meta device. Per GPU, in bytes:

    states        parameters, gradients and optimizer, as sharded by a layout (`state_bytes`)
    activations   kept by the forward pass for the backward pass (`activation_bytes`)
    loss          logits or their chunks, and gradients of head and hidden states (`loss_bytes`)
    step          temporaries of the optimizer's step (`step_bytes`)
    buffers       for communication and gathered layers

Activations and loss are freed before the optimizer's step, so that the larger of both counts. The sum is an upper
estimate: it adds peaks that are not all reached at once. `RESERVED` is the share of a GPU's memory for the CUDA
context, NCCL and fragmentation. Dropout is taken to be 0, as in every config here.

Shapes: B rows of one pass, L length, M = B L tokens, D = hidden_size, F = intermediate_size, H heads, N rows of the
output layer, W GPUs.
Precision: w bytes of a weight, c bytes of a matrix product's input (2 in bfloat16, 4 in float32).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import nn

from ..diffusion.ops.fused import CHUNK_TOKENS
from ..diffusion.ops.rows import BLOCK_ELEMENTS
from ..generation.protocol import output_rows
from .metrics import flops_per_token
from .optimizers import ADAMW, Optimizer
from .precision import check_trained_dtype

GIB = 2**30
RESERVED = 0.08
# DeepSpeed's defaults, which the configs here keep: elements of the bucket for reducing gradients, allocated whole, and
# of the parameters that ZeRO-3 keeps gathered besides those of the current module.
_REDUCE_BUCKET = 500_000_000
_MAX_LIVE_PARAMETERS = 1_000_000_000
# Bytes a weight in NF4 with double quantization: 4 bits, and for each 64 weights one byte of scale, itself scaled.
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)


class Layout(NamedTuple):
    """Sharding of the states: the ZeRO stage, and what is kept in main memory."""

    stage: int
    optimizer_on_host: bool = False
    parameters_on_host: bool = False


# Each name but the first, which is plain data parallelism without DeepSpeed, is a file in recipes/configs/.
LAYOUTS = {
    "ddp": Layout(0),
    "zero1": Layout(1),
    "zero2": Layout(2),
    "zero3": Layout(3),
    "zero2_offload": Layout(2, optimizer_on_host=True),
    "zero3_offload": Layout(3, optimizer_on_host=True, parameters_on_host=True),
}


@dataclass(frozen=True)
class Counts:
    """Parameters of a model.

    Args:
        total, trainable: All parameters, and the trained ones.
        quantized: Frozen parameters stored in 4 bits.
        largest: Parameters of the largest single module, which ZeRO-3 gathers at once.
        block_matrices: Parameters of the blocks' matrices, adapters included.
        head_trained: Whether the output layer is trained.
        trained_tensors: Shape of each trained tensor, and whether it belongs to an embedding.
    """

    total: int
    trainable: int
    quantized: int
    largest: int
    block_matrices: int
    head_trained: bool
    trained_tensors: tuple[tuple[torch.Size, bool], ...]


def count_parameters(model: nn.Module, load_in_4bit: bool = False) -> Counts:
    """Count a model, or a peft model around one; it may live on the meta device. Shared parameters count once.

    Args:
        model: The model, with adapters if it is to have any, not quantized.
        load_in_4bit: Whether the blocks' frozen matrices are to be stored in 4 bits.
    """
    parameters = dict(model.named_parameters())
    blocks = {name: p for name, p in parameters.items() if ".blocks." in name and p.ndim == 2}
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    return Counts(
        total=sum(p.numel() for p in parameters.values()),
        trainable=sum(p.numel() for p in parameters.values() if p.requires_grad),
        quantized=sum(p.numel() for p in blocks.values() if not p.requires_grad) if load_in_4bit else 0,
        largest=max(sum(p.numel() for p in module.parameters(recurse=False)) for module in model.modules()),
        block_matrices=sum(p.numel() for p in blocks.values()),
        head_trained=_is_trained(model.get_output_embeddings()),
        trained_tensors=tuple((p.shape, id(p) in embeddings) for p in parameters.values() if p.requires_grad),
    )


def _is_trained(head: nn.Module) -> bool:
    weight = getattr(head, "weight", None)  # the U-Net's output layer has none
    return weight is not None and weight.requires_grad


@dataclass(frozen=True)
class Run:
    """A training run, as far as it determines the memory.

    Args:
        config: The model's, in Transformers' names for a decoder with a gated MLP.
        counts: Its parameters.
        rows: B, rows of one pass on one GPU.
        length: L, tokens per row.
        gpus: W.
        optimizer: Its state per element.
        dtype: Dtype of the loaded weights.
        bf16: Whether the passes run in bfloat16 (`--bf16 true`).
        checkpointing: Whether activations are recomputed block by block (`--activation_checkpointing true`).
        fused_loss: Whether head and loss are computed together.
        chunk_size: Tokens per chunk of the fused loss; None for its own default on a GPU.
        device: "other" for a GPU, or "cpu"; chunk size and buffers of the fused loss depend on it.
        average: Whether the run keeps an average of the weights (`ema_decay`).

    Raises:
        ValueError: If rows, length or GPUs are not positive.
    """

    config: Any
    counts: Counts
    rows: int
    length: int
    gpus: int = 1
    optimizer: Optimizer = ADAMW
    dtype: torch.dtype = torch.bfloat16
    bf16: bool = True
    checkpointing: bool = False
    fused_loss: bool = True
    chunk_size: int | None = None
    device: str = "other"
    average: bool = False

    def __post_init__(self):
        for name in ("rows", "length", "gpus"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")

    @property
    def adapters_only(self) -> bool:
        return self.counts.trainable < self.counts.total

    def precision(self, layout: Layout) -> tuple[int, int, bool]:
        """w, c, and whether autocast copies the input of each linear layer.

        DeepSpeed casts the model itself and needs no autocast. Without it, trained weights are float32: others are
        refused (`layouts`, `precision.check_trained_dtype`). Autocast copies where inputs are float32: with float32
        weights, and with adapters, which peft keeps in float32.
        """
        weight = 2 if self.dtype in (torch.bfloat16, torch.float16) else 4
        compute = 2 if self.bf16 or weight == 2 else 4
        if layout.stage:
            return compute, compute, False
        if not self.adapters_only:
            weight = 4
        return weight, compute, weight > compute or (self.adapters_only and compute == 2)


class Memory(NamedTuple):
    """Bytes on one GPU, and of main memory for all GPUs of one machine."""

    parameters: float
    gradients: float
    optimizer: float
    activations: float
    loss: float
    step: float
    buffers: float
    host: float

    @property
    def gpu(self) -> float:
        states = self.parameters + self.gradients + self.optimizer + self.buffers
        return states + max(self.activations + self.loss, self.step)


def memory(run: Run, layout: Layout) -> Memory:
    """Memory of a run in a layout."""
    parameters, gradients, optimizer, buffers, host = state_bytes(run, layout)
    if run.average:  # in float32, and a copy of the weights while it replaces them
        buffers += (4 + (run.precision(layout)[0] if layout.stage else 4)) * run.counts.trainable
    passes = activation_bytes(run, layout), loss_bytes(run, layout)
    return Memory(parameters, gradients, optimizer, *passes, step_bytes(run, layout), buffers, host)


def state_bytes(run: Run, layout: Layout) -> tuple[float, float, float, float, float]:
    """Parameters, gradients, optimizer, buffers (all of one GPU), and main memory.

    With P trained and Z frozen parameters (those in 4 bits count `NF4_BYTES` each, the others w), and s bytes of an
    element's states (8 for AdamW, `Optimizer.flat_bytes`; under ddp as `Optimizer.tensor_bytes` adds them up):

        ddp             4 P + w Z            4 P, twice for W > 1    s P                copies of P for autocast
        zero1           w (P + Z)            w P + 4 P / W           (4 + s) P / W      a bucket to reduce gradients
        zero2           w (P + Z)            (w + 4) P / W           (4 + s) P / W      the same
        zero3           w (P + Z) / W        (w + 4) P / W           (4 + s) P / W      the bucket and live parameters
        zero2_offload   w (P + Z)            0                       0                  as zero2
        zero3_offload   0                    0                       0                  as zero3

    Under ddp gradients and states have the dtype of the trained weights, float32, and DDP keeps its own copy of the
    gradients. DeepSpeed keeps float32 weights, 4 bytes, besides the states, and makes float32 gradients of its share at
    the step. Its bucket has 5e8 elements, and ZeRO-3 keeps up to 1e9 gathered parameters alive (`reduce_bucket_size`,
    `stage3_max_live_parameters`) besides the largest module. With AdamW in bfloat16 the states are the totals of
    DeepSpeed's own estimators, which ignore frozen parameters and parts (and leave the 16-bit parameters out
    under ZeRO-3), and so is main memory, with half of it again for buffers; there every optimizer is CPU Adam.
    """
    counts, stage = run.counts, layout.stage
    trained, frozen = counts.trainable, counts.total - counts.trainable - counts.quantized
    width, compute, _ = run.precision(layout)
    shards = run.gpus if stage == 3 else 1
    if not stage:
        parameters = 4 * trained + width * frozen + NF4_BYTES * counts.quantized
        copies = compute * trained if compute < 4 else 0
        states = sum(run.optimizer.tensor_bytes(*tensor) for tensor in counts.trained_tensors)
        return parameters, 4 * trained * (2 if run.gpus > 1 else 1), states, copies, 0.0
    parameters = (width * (trained + frozen) + NF4_BYTES * counts.quantized) / shards
    gradients = 4 * trained / run.gpus + width * trained / (run.gpus if stage > 1 else 1)
    optimizer = (4 + run.optimizer.flat_bytes) * trained / run.gpus
    live = min(trained + frozen, _MAX_LIVE_PARAMETERS + counts.largest) if stage == 3 else 0
    buffers = width * float(_REDUCE_BUCKET + live)
    if not layout.optimizer_on_host:
        return parameters, gradients, optimizer, buffers, 0.0
    if layout.parameters_on_host:
        return 0.0, 0.0, 0.0, buffers, 1.5 * (18 * trained + width * frozen)
    return parameters, 0.0, 0.0, buffers, 1.5 * max(4 * run.gpus, 16) * trained


def step_bytes(run: Run, layout: Layout) -> float:
    """Temporaries of the optimizer's step on one GPU: 4 bytes per parameter for torch's foreach AdamW, none for its
    fused form and for bitsandbytes. Under ZeRO the step works on this GPU's share, in one or few vectors."""
    if layout.optimizer_on_host:
        return 0.0
    optimizer, trained = run.optimizer, run.counts.trainable
    if layout.stage:
        return (optimizer.foreach + optimizer.looped) * trained / run.gpus
    largest = max((math.prod(shape) for shape, _ in run.counts.trained_tensors), default=0)
    return float(optimizer.foreach * trained + optimizer.looped * largest)


def activation_bytes(run: Run, layout: Layout) -> float:
    """Activations kept by the forward pass on one GPU: M times, per block and token,

        norms       2 (4 + w) D           the residual stream in float32, and normalized; 8 D with frozen norms
        linear      2 c D                 input of q, k, v and of gate, up; 5 c D if autocast copies it
        attention   c (2 D + 2 E) + 4 H   queries, E wide keys and values, the result, H log-sums; no (L, L) matrix
        MLP         4 c F                 gate, its SiLU, up, their product

    and the embedding, final norm and head's input. With checkpointing, each block keeps only its input (w D), and one
    block at a time the rest. Eager attention also keeps (L, L) matrices: (4 + c) H L per token.
    """
    config, (width, compute, copies) = run.config, run.precision(layout)
    d, f, heads = config.hidden_size, config.intermediate_size, config.num_attention_heads
    keys = config.num_key_value_heads * d // heads
    norm = 4 if run.adapters_only else 4 + width
    block = 2 * norm * d + compute * d * (5 if copies else 2) + compute * (2 * d + 2 * keys) + 4 * heads
    block += 4 * compute * f
    if copies and run.adapters_only:  # the adapter of attn_out has a copy of its input
        block += compute * d
    if config._attn_implementation == "eager":
        block += heads * run.length * (4 + (compute if compute < 4 else 0))
    ends = (norm + compute) * d
    kept = config.num_hidden_layers * width * d + block if run.checkpointing else config.num_hidden_layers * block
    return float(run.rows * run.length * (kept + ends))


def loss_bytes(run: Run, layout: Layout) -> float:
    """Head and loss on one GPU.

        dense    2 c M N              the logits and their gradient
        fused    c C N + 4 M D        the logits of C tokens, and the gradient of the hidden states in float32
                 c N D                the gradient of a trained head, before it is added to the others
    and two float32 blocks in which rows of logits are read, at most as large as the logits.
    """
    _, compute, _ = run.precision(layout)
    rows, tokens = output_rows(run.config), run.rows * run.length
    blocks = 8.0 * min(BLOCK_ELEMENTS[run.device], tokens * rows)
    head = compute * rows * run.config.hidden_size if run.counts.head_trained else 0
    if not run.fused_loss:
        return 2.0 * compute * tokens * rows + blocks + head
    chunk = min(run.chunk_size or CHUNK_TOKENS[run.device], tokens)
    blocks = min(blocks, 8.0 * chunk * rows)
    return blocks + compute * chunk * rows + 4 * tokens * run.config.hidden_size + head


def run_flops(model: nn.Module, counts: Counts, length: int, tokens: int, checkpointing: bool) -> float:
    """Floating-point operations of a run over `tokens` tokens: `flops_per_token`, and with checkpointing a second
    forward pass through the blocks: 2 for each weight of their matrices and 4 D L for attention of each layer."""
    per_token = flops_per_token(model, length)
    if checkpointing:
        per_token += 2 * counts.block_matrices + 4 * model.config.num_hidden_layers * model.config.hidden_size * length
    return per_token * tokens


def layouts(run: Run) -> dict[str, Layout]:
    """The possible layouts of a run: ZeRO-3 cannot shard 4-bit weights, only AdamW can be in main memory, and only
    DeepSpeed, with its float32 copies, can train 16-bit weights."""
    in_16_bits = run.dtype.itemsize < 4 and not run.adapters_only
    return {
        name: layout
        for name, layout in LAYOUTS.items()
        if not (layout.stage == 3 and run.counts.quantized)
        and (run.optimizer.offloads or not layout.optimizer_on_host)
        and (layout.stage or not in_16_bits)
    }


def layout_of(run: Run, name: str) -> Layout:
    """The layout of this name.

    Raises:
        ValueError: If there is none, or the run cannot take it.
    """
    if name == "ddp" and not run.adapters_only:
        check_trained_dtype(run.dtype, None, "plan_layout='ddp': ")
    if name not in layouts(run):
        raise ValueError(f"plan_layout={name!r} is not known for this run; choose one of {', '.join(layouts(run))}.")
    return LAYOUTS[name]


def fits(run: Run, layout: Layout, gpu_memory: float) -> bool:
    """Whether a GPU of `gpu_memory` GiB is enough."""
    return memory(run, layout).gpu <= gpu_memory * GIB * (1 - RESERVED)


def check_fit(run: Run, name: str | None, gpu_memory: float) -> None:
    """Refuse a plan that cannot fit.

    Args:
        run: The plan.
        name: Its layout; None for the one that needs least.
        gpu_memory: Of one GPU, in GiB.

    Raises:
        ValueError: If the layout is unknown, or needs more than there is; the message says what would fit.
    """
    if not gpu_memory > 0:
        raise ValueError(f"plan_gpu_memory={gpu_memory} must be positive, in GiB.")
    least = name or min(layouts(run), key=lambda layout: memory(run, LAYOUTS[layout]).gpu)
    if fits(run, layout_of(run, least), gpu_memory):
        return
    need = memory(run, LAYOUTS[least]).gpu / GIB
    found = [what for what, change in _remedies(run, least) if fits(*change, gpu_memory)]
    found = found or [what for what, change in _all_remedies(run) if fits(*change, gpu_memory)]
    raise ValueError(
        f"the plan does not fit: {least} on {run.gpus} GPUs needs {need:.1f} GiB of each, and {gpu_memory:g} GiB leave "
        f"{gpu_memory * (1 - RESERVED):.1f} ({RESERVED:.0%} are reserved). "
        + (f"Any of these fits: {'; '.join(found)}." if found else "No layout and no smaller batch fits.")
        + ("" if run.adapters_only else " Adapters (lora_rank, with load_in_4bit the base in 4 bits) need far less.")
    )


def _remedies(run: Run, name: str) -> Iterator[tuple[str, tuple[Run, Layout]]]:
    """Changes to a run and the resulting runs, in the order of increasing cost."""
    layout = LAYOUTS[name]
    if not run.fused_loss:
        yield "leave fused_loss out", (replace(run, fused_loss=True), layout)
    if not run.checkpointing:
        yield "activation_checkpointing true", (replace(run, checkpointing=True), layout)
    if run.rows > 1:
        yield "per_device_train_batch_size 1", (replace(run, rows=1), layout)
    for other, spread in layouts(run).items():
        if other != name:
            yield f"{other}.yaml" if spread.stage else other, (run, spread)
    for factor in (2, 4, 8):
        yield f"{factor * run.gpus} GPUs", (replace(run, gpus=factor * run.gpus), layout)


def _all_remedies(run: Run) -> Iterator[tuple[str, tuple[Run, Layout]]]:
    slim = replace(run, rows=1, checkpointing=True, fused_loss=True)
    for name, layout in layouts(run).items():
        yield f"per_device_train_batch_size 1 with activation_checkpointing, the fused loss and {name}", (slim, layout)
