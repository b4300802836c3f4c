"""Logits of the positions that a step requests, with cache, classifier-free guidance and logits processors.

Guidance evaluates two streams: the text, and an unconditional one. With class labels this is the same text with the
null class, and both are one batch; otherwise it is the text with its prompt masked.

Shapes: R active rows, T total length, C columns, m positions of a chunk, N vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers.generation import LogitsProcessorList

from ..diffusion.categorical import row_slices
from ..diffusion.checks import work_dtype
from .cache import CanvasCache, RefreshPlan
from .canvas import Canvas
from .options import Options
from .protocol import logits_at, output_rows, padding_inputs, runs_in_parts
from .sampler import Request, Sampler

# Logits per product of the output layer when it runs in chunks: large enough to read the layer's weights seldom, small
# enough for memory (12 MB in float32 on a CPU, 256 MB on a GPU).
_CHUNK_ELEMENTS = {"cpu": 3 * 2**20, "other": 2**26}


class Network:
    """Logits of chosen positions: forward pass, cache, guidance, processors; counts forward passes.

    Args:
        model: Ids to logits, a `DiffusionModel`.
        attention_mask: (B, T), 0 at padding.
        canvas: The sampler's first canvas.
        options: The resolved options.
        processors: The user's logits processors.
        class_labels: (B,), or None for the null class.
    """

    counts_padding = False  # whether positions count padding
    one_batch = False  # whether the streams are evaluated as one batch, also those of a masked prompt
    fixed_shapes = False  # whether rows that are done stay in the batch

    def __init__(
        self,
        model: Any,
        attention_mask: Tensor,
        canvas: Canvas,
        options: Options,
        processors: LogitsProcessorList | None,
        class_labels: Tensor | None = None,
    ):
        self.model, self.options, self.class_labels = model, options, class_labels
        self.guidance_mask = self._guidance_mask(attention_mask, canvas)
        self.processors = LogitsProcessorList(processors) if processors else None
        self.num_forward_passes = 0
        # Made once: a copy from the host synchronizes with the device.
        self.suppressed = torch.tensor(options.suppress_tokens or [], dtype=torch.long, device=canvas.ids.device)
        padding = padding_inputs(model, attention_mask)
        self.attention_mask: Tensor | None = padding.get("attention_mask")
        self.position_ids: Tensor | None = None if self.counts_padding else padding.get("position_ids")
        self.plan = RefreshPlan(options.use_cache, options.cache_refresh) if options.use_cache else None
        # One for each stream of guidance.
        self.caches = (
            [CanvasCache(model.config.num_hidden_layers) for _ in range(2)] if options.use_cache else [None, None]
        )

    def _guidance_mask(self, attention_mask: Tensor, canvas: Canvas) -> Tensor:
        """(B, T) bool, positions that are masked in the unconditional stream: all fixed text."""
        return attention_mask.bool() & ~canvas.generated

    def at_columns(self, ids: Tensor, request: Request, sampler: Sampler) -> tuple[Tensor, Request]:
        """Logits (R, C, N) of the requested columns, and the request.

        In the model's dtype, or float32 or wider with guidance, processors or suppressed tokens. With a cache the
        columns of the returned request are those computed in this step.
        """
        positions, columns = request.columns, None
        if self.plan is not None:
            i = request.i
            planned = self.plan.columns(ids, sampler.block(i), self._most_edited(sampler, i), sampler.polishing(i))
            if planned is not None:
                columns, valid = planned
                request = replace(request, columns=columns[:, : valid.shape[1]], valid=valid)
                positions = torch.arange(valid.shape[1], device=ids.device)
        return self._processed(self._stream_logits(ids, positions, columns, request.t), ids), request

    def _most_edited(self, sampler: Sampler, i: int) -> int | None:
        """Most columns outside the window of step `i` that the last step edited in a row; None: count them."""
        return None if sampler.may_edit else 0

    def at_mask(self, ids: Tensor, mask: Tensor, t: float | None = None) -> Iterator[Tensor]:
        """Logits of the positions `mask` (R, T) in row-major order, in chunks (m, N); the dtype is as in `at_columns`.

        An empty mask takes no forward pass. `t` is the time of the step, if the sampler has one.
        """
        if not mask.any():
            return
        rows = mask.nonzero()[:, 0]
        if not runs_in_parts(self.model):
            yield self._processed(self._stream_logits(ids, mask, None, t), ids[rows])
            return
        body, head = self.model.base_model, self.model.get_output_embeddings()
        hidden_states = self._run_streams(
            ids, None, t, lambda inputs, repeats: body(**inputs).last_hidden_state[mask.repeat(repeats, 1)]
        )
        for part in chunk_slices(len(rows), output_rows(self.model.config), ids.device):
            yield self._processed([head(hidden[part]) for hidden in hidden_states], ids[rows[part]])

    def _stream_logits(
        self, ids: Tensor, positions: Tensor, columns: Tensor | None, t: float | None
    ) -> Sequence[Tensor]:
        """Logits of each stream, see `logits_at`; with a cache only `columns` (R, A) are computed."""

        def run(inputs: dict[str, Any], repeats: int) -> Tensor:
            return logits_at(self.model, inputs, positions.repeat(repeats, 1) if positions.ndim == 2 else positions)

        return self._run_streams(ids, columns, t, run)

    def _run_streams(
        self, ids: Tensor, columns: Tensor | None, t: float | None, run: Callable[[dict[str, Any], int], Tensor]
    ) -> Sequence[Tensor]:
        """`run(inputs, repeats)` for each stream; `repeats` is the number of streams in one batch."""
        streams = self._streams(ids)
        together = self.plan is None and (self.one_batch or self.class_labels is not None)
        if len(streams) > 1 and together:
            joined = {name: torch.cat([stream[name] for stream in streams]) for name in streams[0]}
            inputs = self._inputs(joined, None, t, len(streams))
            return run(inputs, len(streams)).chunk(len(streams))
        return [run(self._inputs(x, columns, t, 1, self.caches[i]), 1) for i, x in enumerate(streams)]

    def _streams(self, ids: Tensor) -> Sequence[dict[str, Tensor]]:
        """Ids (R, T) and, if any, class labels (R,) of each stream."""
        labels = self.class_labels
        text = {"input_ids": ids} if labels is None else {"input_ids": ids, "class_labels": labels}
        if not self.options.cfg_scale:
            return (text,)
        if labels is not None:
            return text, {"input_ids": ids, "class_labels": torch.full_like(labels, self.model.num_classes)}
        return text, {"input_ids": torch.where(self.guidance_mask, self.options.mask_token_id, ids)}

    def _inputs(
        self,
        stream: dict[str, Tensor],
        columns: Tensor | None,
        t: float | None,
        repeats: int,
        cache: CanvasCache | None = None,
    ) -> dict[str, Any]:
        """Arguments of one forward pass over a stream, or over `repeats` streams in one batch; also counts them."""
        self.num_forward_passes += repeats
        padding = {"attention_mask": self.attention_mask, "position_ids": self.position_ids}
        inputs = stream | {name: value.repeat(repeats, 1) for name, value in padding.items() if value is not None}
        if columns is not None:
            inputs["position_ids"] = columns if self.position_ids is None else self.position_ids.gather(1, columns)
            inputs["input_ids"] = stream["input_ids"].gather(1, columns)
        if cache is not None:
            inputs["past_key_values"] = cache.at(columns)
        if "timesteps" in self.model.conditioning:
            ids = stream["input_ids"]
            inputs["timesteps"] = self.model.timesteps(
                torch.full((len(ids),), t, dtype=torch.float64, device=ids.device)
            )
        return inputs

    def _processed(self, streams: Sequence[Tensor], ids: Tensor) -> Tensor:
        """Guidance, the user's processors, suppressed tokens.

        Args:
            streams: Logits of each stream, (R, C, N) or (m, N).
            ids: The texts (R, T), or the text of each position (m, T).
        """
        adjusts = len(streams) > 1 or self.processors is not None or len(self.suppressed)
        if adjusts:
            streams = [self._upcast(logits) for logits in streams]
        logits = streams[0]
        if len(streams) > 1:
            guided = streams[1] + (self.options.cfg_scale + 1) * (logits - streams[1])
            # Rows that the network itself excludes are -inf in both streams, and their difference would be NaN.
            logits = guided.masked_fill(logits.isneginf(), -torch.inf)
        if self.processors is not None:
            rows = ids if logits.ndim == 2 else ids.repeat_interleave(logits.shape[1], 0)
            logits = self.processors(rows, logits.view(-1, logits.shape[-1])).view(logits.shape)
        if len(self.suppressed):
            logits = logits.index_fill(-1, self.suppressed, -torch.inf)
        return logits

    def _upcast(self, logits: Tensor) -> Tensor:
        """The logits in the dtype of guidance and processors, float32 or wider."""
        return logits.to(work_dtype(logits))

    def release(self) -> None:
        """Called after the last step, also if there was an error."""

    def select(self, rows: Tensor) -> None:
        """Keep some rows of the batch, (rows,)."""
        self.guidance_mask = self.guidance_mask[rows]
        if self.class_labels is not None:
            self.class_labels = self.class_labels[rows]
        if self.attention_mask is not None:
            self.attention_mask = self.attention_mask[rows]
        if self.position_ids is not None:
            self.position_ids = self.position_ids[rows]
        if self.plan is not None:
            self.plan.select(rows)
            for cache in self.caches:
                if cache.get_seq_length():
                    cache.batch_select_indices(rows)


def chunk_slices(m: int, vocab_size: int, device: torch.device) -> Iterator[slice]:
    """Slices of m positions, one for each product of the output layer."""
    return row_slices(m, vocab_size, device, _CHUNK_ELEMENTS)
