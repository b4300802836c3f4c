"""The network as a sampler sees it: logits of the positions asked for, with cache, guidance and processors.

Shapes: R rows still at work, T whole length, C columns, m positions of a chunk, N vocabulary.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers.generation import LogitsProcessorList

from ..diffusion.categorical import row_slices
from .cache import CanvasCache, RefreshPlan
from .canvas import Canvas
from .protocol import check_padding, forward_arguments, logits_at, output_rows, runs_in_parts
from .sampler import Request, Sampler

# Logits that one product of the output layer makes, where a step reads them a few positions at a time: enough for the
# layer's weights to be read seldom, few enough to take little memory (12 MB in float32 on a CPU, 256 MB on a GPU).
_CHUNK_ELEMENTS = {"cpu": 3 * 2**20, "other": 2**26}


class Network:
    """Logits of chosen positions: forward pass, cache, guidance, processors; counts forward passes.

    Args:
        model: Ids to logits, a `DiffusionModel`.
        attention_mask: (B, T), 0 at padding.
        canvas: The sampler's first canvas.
        options: A resolved `XDLMGenerationConfig`.
        processors: The user's.
    """

    def __init__(
        self,
        model: Any,
        attention_mask: Tensor,
        canvas: Canvas,
        options: Any,
        processors: LogitsProcessorList | None,
    ):
        self.model, self.options = model, options
        self.hidden = self._hidden(attention_mask, canvas)
        self.processors = LogitsProcessorList(processors) if processors else None
        self.num_forward_passes = 0
        self.attention_mask: Tensor | None = None
        self.position_ids: Tensor | None = None
        # Without padding there is nothing to tell the model, and attention runs its fastest kernel.
        if not attention_mask.all():
            check_padding(model, attention_mask)
            self.attention_mask = attention_mask
            if "position_ids" in forward_arguments(type(model)):
                self.position_ids = self._positions(attention_mask)
        self.plan = RefreshPlan(options.use_cache, options.cache_refresh) if options.use_cache else None
        # Guidance runs two streams, and each has its own keys and values.
        self.caches = (
            [CanvasCache(model.config.num_hidden_layers) for _ in range(2)] if options.use_cache else [None, None]
        )

    def _hidden(self, attention_mask: Tensor, canvas: Canvas) -> Tensor:
        """(B, T) bool, the text that guidance hides: the prompt, and what else is fixed."""
        return attention_mask.bool() & ~canvas.generated

    def _positions(self, attention_mask: Tensor) -> Tensor | None:
        """(B, T) position ids. They count text alone, so that a row computes what it computes by itself, wherever its
        padding stands."""
        return (attention_mask.cumsum(-1) - 1).clamp_min(0)

    def at_columns(self, ids: Tensor, request: Request, sampler: Sampler) -> tuple[Tensor, Request]:
        """Logits (R, C, N) of the columns that a step asks for, in the model's dtype.

        Guided, processed or suppressed ones are float32 or wider. With a cache the request comes back with the columns
        that could be had: those computed in this step.
        """
        positions, columns = request.columns, None
        if self.plan is not None:
            i = request.i
            planned = self.plan.columns(ids, sampler.block(i), sampler.may_edit, sampler.polishing(i))
            if planned is not None:
                columns, valid, open_columns = planned
                request = replace(request, columns=columns[:, :open_columns], valid=valid)
                positions = torch.arange(open_columns, device=ids.device)
        return self._adjusted(self._streams(ids, positions, columns, request.t), ids), request

    def at_mask(self, ids: Tensor, mask: Tensor, t: float | None = None) -> Iterator[Tensor]:
        """Logits of the positions (R, T) bool in row-major order, chunk by chunk (m, N), of a dtype as `at_columns`.

        No position costs no forward pass. `t` is the time of the step, if it is known.
        """
        if not mask.any():
            return
        rows = mask.nonzero()[:, 0]
        if not runs_in_parts(self.model):
            yield self._adjusted(self._streams(ids, mask, None, t), ids[rows])
            return
        body, head = self.model.base_model, self.model.get_output_embeddings()
        texts = enumerate(self._texts(ids))
        streams = [body(**self._inputs(stream, text, None, t)).last_hidden_state[mask] for stream, text in texts]
        for part in chunk_slices(len(rows), output_rows(self.model.config), ids.device):
            yield self._adjusted([head(hidden[part]) for hidden in streams], ids[rows[part]])

    def _streams(self, ids: Tensor, positions: Tensor, columns: Tensor | None, t: float | None) -> Sequence[Tensor]:
        """Logits of each text, see `logits_at`; with a cache only `columns` (R, W) are computed."""
        return [
            logits_at(self.model, self._inputs(stream, text, columns, t), positions)
            for stream, text in enumerate(self._texts(ids))
        ]

    def _texts(self, ids: Tensor) -> Sequence[Tensor]:
        """What the network reads, (R, T) each: the text, and under guidance the text with its prompt hidden."""
        if not self.options.cfg_scale:
            return (ids,)
        return ids, torch.where(self.hidden, self.options.mask_token_id, ids)

    def _inputs(self, stream: int, ids: Tensor, columns: Tensor | None, t: float | None) -> dict[str, Any]:
        """Arguments of one forward pass, which is counted."""
        self.num_forward_passes += 1
        inputs = {"attention_mask": self.attention_mask, "position_ids": self.position_ids}
        if columns is not None:
            inputs["position_ids"] = columns if self.position_ids is None else self.position_ids.gather(1, columns)
            ids = ids.gather(1, columns)
        if self.caches[stream] is not None:
            inputs["past_key_values"] = self.caches[stream].at(columns)
        if "timesteps" in self.model.conditioning:
            times = torch.full((len(ids),), t, dtype=torch.float64, device=ids.device)
            inputs["timesteps"] = self.model.timesteps(times)
        return {"input_ids": ids, **{name: value for name, value in inputs.items() if value is not None}}

    def _adjusted(self, streams: Sequence[Tensor], ids: Tensor) -> Tensor:
        """Guidance, the user's processors, suppressed tokens.

        Args:
            streams: Logits of each text, (R, C, N) or (m, N).
            ids: The texts (R, T) that they are about, or (m, T).
        """
        adjusts = len(streams) > 1 or self.processors is not None or self.options.suppress_tokens
        if adjusts:
            streams = [self._widened(logits) for logits in streams]
        logits = streams[0]
        if len(streams) > 1:
            logits = streams[1] + (self.options.cfg_scale + 1) * (logits - streams[1])
        if self.processors is not None:
            rows = ids if logits.ndim == 2 else ids.repeat_interleave(logits.shape[1], 0)
            logits = self.processors(rows, logits.view(-1, logits.shape[-1])).view(logits.shape)
        if self.options.suppress_tokens:
            logits = logits.index_fill(-1, torch.tensor(self.options.suppress_tokens, device=ids.device), -torch.inf)
        return logits

    def _widened(self, logits: Tensor) -> Tensor:
        """The dtype in which logits are combined: float32 or wider."""
        return logits if logits.dtype == torch.float64 else logits.float()

    def select(self, rows: Tensor) -> None:
        """Keep some rows of the batch, (rows,)."""
        self.hidden = self.hidden[rows]
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
    """Slices of m positions, each of as many as the output layer is run on at a time."""
    return row_slices(m, vocab_size, device, _CHUNK_ELEMENTS)
