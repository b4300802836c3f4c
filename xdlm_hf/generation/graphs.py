"""Forward passes at fixed shapes, each captured once as a CUDA graph and then replayed: `generate(compile="graphs")`.

A pass launches over a thousand kernels, which may take the host longer than the device needs for a short batch. A graph
launches them at once. It repeats the captured kernels on the captured memory, hence:

- Every kind of pass ("stage") has one shape: requests are padded to the largest one, edited columns to their bound, and
  rows that are done stay in the batch.
- A stage reads its inputs and the padding from memory that stays; they are copied there. The keys and values of a cache
  are in the memory of the full pass's graph.
- Only the network is captured. What a sampler does with the logits runs as ever and does not wait for the device.

Graphs are kept for later calls with the same weights and shapes. On a CPU a stage runs its pass on the same memory.

Shapes: B batch, T total length, C columns of a request, A columns that a pass computes, N vocabulary.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from .cache import CanvasCache
from .confidence import ConfidenceSampler
from .network import Network
from .sampler import Request

_WARM_UP = 2  # passes on the capturing stream before the capture; the first call of a library may allocate
_PER_CALL = ("attention_mask", "position_ids", "guidance_mask", "class_labels")  # tensors of a call that passes read
# Options that passes or their shapes depend on.
_SHAPING = ("max_new_tokens", "block_length", "mixing_ratio", "refinement", "use_cache", "cfg_scale", "mask_token_id")
_MOST_KEPT = 4  # per model: a set of graphs holds the cache and the logits of its shapes


class Stage:
    """One kind of pass: a function of tensors that stay, captured on a GPU at its first call.

    Args:
        inputs: Arguments of the first call, by name.
    """

    def __init__(self, inputs: Mapping[str, Tensor]):
        self.inputs = {name: x.clone(memory_format=torch.contiguous_format) for name, x in inputs.items()}
        self.graph: torch.cuda.CUDAGraph | None = None
        self.outputs: Sequence[Tensor] = ()

    def __call__(
        self, run: Callable[..., Sequence[Tensor]], inputs: Mapping[str, Tensor], pool: Any
    ) -> Sequence[Tensor]:
        """`run(**inputs)`; on a GPU the result is overwritten by the next call.

        Args:
            run: The pass. It must not read anything that another call may have replaced.
            inputs: Of the shapes of the first call.
            pool: Memory for the capture.
        """
        for name, x in inputs.items():
            self.inputs[name].copy_(x)
        if self.graph is None and _captures(self.inputs["ids"].device):
            self._capture(run, pool)
        if self.graph is None:
            return run(**self.inputs)
        self.graph.replay()
        return self.outputs

    def _capture(self, run: Callable[..., Sequence[Tensor]], pool: Any) -> None:
        with torch.cuda.device(self.inputs["ids"].device):
            stream, current = torch.cuda.Stream(), torch.cuda.current_stream()
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                for _ in range(_WARM_UP):
                    run(**self.inputs)
            current.wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            # Other threads, such as a server's, may use the device meanwhile.
            with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                self.outputs = run(**self.inputs)
        self.graph = graph


def _captures(device: torch.device) -> bool:
    return device.type == "cuda"


def _new_pool(device: torch.device) -> Any:
    return torch.cuda.graph_pool_handle() if _captures(device) else None


@dataclass
class Graphs:
    """The stages of one model, batch size and length, and the memory that they share."""

    caches: list[CanvasCache | None]
    pool: Any = None  # a new one whenever no graph is left: memory of a pool without graphs cannot be captured again
    buffers: dict[str, Tensor] = field(default_factory=dict)  # padding, labels and the like of the current call
    stages: dict[tuple, Stage] = field(default_factory=dict)

    def buffer(self, name: str, x: Tensor | None) -> Tensor | None:
        """`x`, copied to memory that stays."""
        if x is None:
            return None
        if name not in self.buffers:
            self.buffers[name] = x.clone(memory_format=torch.contiguous_format)
        return self.buffers[name].copy_(x)

    def run(self, run: Callable[..., Sequence[Tensor]], inputs: Mapping[str, Tensor]) -> Sequence[Tensor]:
        """`run(**inputs)` by the stage of these shapes."""
        shapes = tuple((name, tuple(x.shape)) for name, x in inputs.items())
        stage = self.stages.get(shapes)
        if stage is None:
            stage = Stage(inputs)
            if "columns" not in inputs:  # a full pass allocates the keys and values that other passes read
                self.stages.clear()
                self.pool = _new_pool(inputs["ids"].device)
        outputs = stage(run, inputs, self.pool)
        self.stages[shapes] = stage  # not if its capture failed
        return outputs


# Taken by a call and returned at its end, so that no two calls at a time use one set.
_KEPT: WeakKeyDictionary[nn.Module, dict[tuple, Graphs]] = WeakKeyDictionary()


class GraphedNetwork(Network):
    """A `Network` whose passes have fixed shapes and are captured once; for the confidence sampler.

    The arguments are those of `Network`.
    """

    fixed_shapes = True

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        own = {name: getattr(self, name) for name in _PER_CALL}
        self._key = (
            _state(self.model),
            tuple((name, None if x is None else tuple(x.shape)) for name, x in own.items()),
            tuple(getattr(self.options, name) for name in _SHAPING),
        )
        graphs = _KEPT.setdefault(self.model, {}).pop(self._key, None)
        self.graphs = Graphs(self.caches) if graphs is None else graphs
        self.caches = self.graphs.caches
        for name, x in own.items():
            setattr(self, name, self.graphs.buffer(name, x))

    def release(self) -> None:
        kept = _KEPT[self.model]
        kept[self._key] = self.graphs
        while len(kept) > _MOST_KEPT:
            del kept[next(iter(kept))]

    def at_columns(self, ids: Tensor, request: Request, sampler: ConfidenceSampler) -> tuple[Tensor, Request]:
        padding = sampler.most_columns - len(request.columns)
        if padding:
            # In front, and equal to the last column, as in the windows of a cache.
            columns = torch.cat([request.columns[-1:].expand(padding), request.columns])
            valid = (torch.arange(len(columns), device=columns.device) >= padding).expand(len(ids), -1)
            request = replace(request, columns=columns, valid=valid)
        return super().at_columns(ids, request, sampler)

    def _most_edited(self, sampler: ConfidenceSampler, i: int) -> int:
        return sampler.most_edited(i)

    def _stream_logits(
        self, ids: Tensor, positions: Tensor, columns: Tensor | None, t: float | None
    ) -> Sequence[Tensor]:
        inputs = {"ids": ids, "positions": positions} | ({} if columns is None else {"columns": columns})
        passes, run = self.num_forward_passes, super()._stream_logits
        logits = self.graphs.run(lambda ids, positions, columns=None: run(ids, positions, columns, t), inputs)
        self.num_forward_passes = passes + len(logits)  # a replay does not count, and a capture counts several
        return logits


def _state(model: Any) -> tuple:
    """Identifies what a capture of the model depends on: where its weights are, its hooks and its modes."""
    weights = tuple((x.data_ptr(), x.dtype, tuple(x.shape)) for x in (*model.parameters(), *model.buffers()))
    # The keys are numbers that are not used again.
    hooks = tuple(key for module in model.modules() for key in (*module._forward_pre_hooks, *module._forward_hooks))
    return weights, hooks, model.training, model.config._attn_implementation


def check_capture(model: Any) -> None:
    """Raise ValueError for a model whose passes cannot be captured, naming why and the remedy."""
    devices = sorted({str(x.device) for x in model.parameters()})
    if len(devices) > 1 or not devices[0].startswith(("cuda", "cpu")):
        raise ValueError(
            f"compile='graphs' needs a model on one CUDA device or on the CPU, and its weights are on "
            f"{', '.join(devices)}; load it with device_map={{'': 0}}, or leave out compile."
        )
    attention = str(model.config._attn_implementation)
    if "flash" in attention or "flex" in attention:
        raise ValueError(
            f"compile='graphs' needs masks that stay on the device, and attn_implementation={attention!r} reads them; "
            "load the model with attn_implementation='sdpa' or 'eager', or leave out compile."
        )
    if any(hasattr(module, "base_layer") for module in model.modules()):
        raise ValueError(
            "compile='graphs' would not notice adapters that are switched; merge them into the weights "
            "(merge_and_unload), or leave out compile."
        )
    kind = devices[0].partition(":")[0]
    if torch.is_autocast_enabled(kind):
        raise ValueError(
            "compile='graphs' does not work under autocast, whose casts of the weights are temporary; load the weights "
            f"in {torch.get_autocast_dtype(kind)}, or leave out compile."
        )
