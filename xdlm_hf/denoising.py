"""The loop around a sampler: the network where a step needs it, and which rows are still at work.

`generation.py` resolves what the user asked for and calls `denoise`. Costs are counted in forward passes.

Shapes: B batch, R <= B rows still at work, T whole length (prompt and answer), N rows of the output layer.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers.generation import LogitsProcessorList, StoppingCriteriaList

from .cache import CanvasCache, RefreshPlan
from .posterior import row_slices
from .refinement import Canvas
from .samplers import Request, Sampler

# A row at end-of-text is looked for every so many steps: looking waits for the device.
_STEPS_BETWEEN_CHECKS = 4
# Logits that one product of the output layer makes, where a step reads them a few positions at a time: enough for the
# layer's weights to be read seldom, few enough to take little memory (12 MB in float32 on a CPU, 256 MB on a GPU).
_CHUNK_ELEMENTS = {"cpu": 3 * 2**20, "other": 2**26}


class Network:
    """Logits of chosen positions: forward pass, cache, guidance, processors; counts forward passes.

    Args:
        model: Ids to logits.
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
            self.attention_mask = attention_mask
            self.position_ids = self._positions(attention_mask)
        self.plan = RefreshPlan(options.use_cache, options.cache_refresh) if options.use_cache else None
        # Guidance runs two streams, and each has its own keys and values.
        self.caches = [CanvasCache(model.config.n_layers) for _ in range(2)] if options.use_cache else [None, None]

    def _hidden(self, attention_mask: Tensor, canvas: Canvas) -> Tensor:
        """(B, T) bool, the text that guidance hides: the prompt, and what else is fixed."""
        return attention_mask.bool() & ~canvas.generated

    def _positions(self, attention_mask: Tensor) -> Tensor | None:
        """(B, T) position ids. They count text alone, so that a row computes what it computes by itself, wherever its
        padding stands."""
        return (attention_mask.cumsum(-1) - 1).clamp_min(0)

    def logits(self, ids: Tensor, request: Request, sampler: Sampler) -> tuple[Tensor | Iterator[Tensor], Request]:
        """What a step asked for, and for which positions it could be had: with a cache, those computed in this step.

        Logits of columns are (R, C, N), those of a mask come in chunks (m, N), in the model's dtype; guided, processed
        or suppressed ones in float32 or wider.
        """
        positions = request.positions
        if positions.dtype == torch.bool:
            return self._chunks(ids, positions), request
        columns = None
        if self.plan is not None:
            i = request.i
            planned = self.plan.columns(ids, sampler.block(i), sampler.may_edit, sampler.polishing(i))
            if planned is not None:
                columns, valid, open_columns = planned
                request = replace(request, positions=columns[:, :open_columns], valid=valid)
                positions = torch.arange(open_columns, device=ids.device)
        return self._adjusted(self._streams(ids, positions, columns), ids), request

    def _streams(self, ids: Tensor, positions: Tensor, columns: Tensor | None) -> Sequence[Tensor]:
        """Logits of each text at the positions, (R, C, N) each; with a cache only `columns` (R, W) are computed."""
        return [
            self.model(logits_to_keep=positions, **self._inputs(stream, text, columns)).logits
            for stream, text in enumerate(self._texts(ids))
        ]

    def _chunks(self, ids: Tensor, positions: Tensor) -> Iterator[Tensor]:
        """Logits of the positions (R, T) bool in row-major order, chunk by chunk; none cost no forward pass."""
        if not positions.any():
            return
        texts, rows = enumerate(self._texts(ids)), positions.nonzero()[:, 0]
        if not is_unwrapped(self.model):
            keep = {"logits_to_keep": positions}
            streams = [self.model(**self._inputs(stream, text, None), **keep).logits for stream, text in texts]
            yield self._adjusted(streams, ids[rows])
            return
        body, head = self.model.base_model, self.model.get_output_embeddings()
        streams = [body(**self._inputs(stream, text, None)).last_hidden_state[positions] for stream, text in texts]
        for part in chunk_slices(len(rows), self.model.config.embedding_size, ids.device):
            yield self._adjusted([head(hidden[part]) for hidden in streams], ids[rows[part]])

    def _texts(self, ids: Tensor) -> Sequence[Tensor]:
        """What the network reads, (R, T) each: the text, and under guidance the text with its prompt hidden."""
        if not self.options.cfg_scale:
            return (ids,)
        return ids, torch.where(self.hidden, self.options.mask_token_id, ids)

    def _inputs(self, stream: int, ids: Tensor, columns: Tensor | None) -> dict[str, Any]:
        """Arguments of one forward pass, which is counted."""
        self.num_forward_passes += 1
        inputs = {"attention_mask": self.attention_mask, "position_ids": self.position_ids}
        if columns is not None:
            inputs["position_ids"] = columns if self.position_ids is None else self.position_ids.gather(1, columns)
            ids = ids.gather(1, columns)
        if self.caches[stream] is not None:
            inputs["past_key_values"] = self.caches[stream].at(columns)
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


def is_unwrapped(model: torch.nn.Module) -> bool:
    """Whether calling the model runs its class's `forward` and nothing else. FSDP, accelerate (autocast, models spread
    over devices) and torch.compile put themselves around it, and then parts of the model must not be called alone."""
    around = model._forward_pre_hooks or model._forward_hooks or model._compiled_call_impl
    return not around and "forward" not in vars(model)


def chunk_slices(m: int, vocab_size: int, device: torch.device) -> Iterator[slice]:
    """Slices of m positions, each of as many as the output layer is run on at a time."""
    return row_slices(m, vocab_size, device, _CHUNK_ELEMENTS)


class Finished:
    """Which rows need no more steps, and what becomes of the text after their end.

    Args:
        options: A resolved `XDLMGenerationConfig`.
        criteria: The user's, asked after each block.
        answer: (B, T) bool, where an end-of-text token counts; None: nowhere.
        may_change: Whether a token once filled may still change.

    Raises:
        ValueError: If there are criteria and no padding token for what follows the end.
    """

    def __init__(self, options: Any, criteria: StoppingCriteriaList | None, answer: Tensor | None, may_change: bool):
        self.options, self.answer = options, answer
        self.criteria = StoppingCriteriaList(criteria) if criteria else None
        self.ends: Tensor | None = None  # (B,) column after which a row is padding
        if criteria and options.pad_token_id is None:
            raise ValueError("stopping_criteria need a pad_token_id for what follows the end of a row; pass one.")
        pads = bool(options.end_of_text) and options.pad_token_id is not None
        self.cuts = pads and answer is not None
        # Where tokens may still change, leaving at end-of-text is a choice that can change the text.
        wanted = (not may_change) if options.early_stop is None else options.early_stop
        self.leaves_at_end_of_text = self.cuts and wanted and options.sampler == "confidence"

    def after_block(self, ids: Tensor, rows: Tensor, block_end: int) -> Tensor:
        """Ask the criteria about the batch (B, T) up to `block_end`; (R,) bool, which of `rows` (R,) are done.

        About the whole batch, also when rows have left it: a criterion may know its rows by their place.
        """
        if self.ends is None:
            self.ends = torch.full_like(self.answer[:, 0], ids.shape[1], dtype=torch.long)
        done = self.criteria(self.pad(ids)[:, :block_end], None).to(ids.device)[rows]
        self.ends[rows] = torch.where(done, self.ends[rows].clamp_max(block_end), self.ends[rows])
        return done

    def at_end_of_text(self, before: Canvas, after: Canvas, rows: Tensor) -> Tensor:
        """(R,) bool: rows with an end-of-text token, no hole before it, and nothing before it edited in this step."""
        is_eos = self._is_eos(after.ids, rows) & ~after.holes
        until = is_eos.long().cumsum(-1) == 0
        open_before = (after.holes | (after.generated & (before.ids != after.ids) & ~before.holes)) & until
        return is_eos.any(-1) & ~open_before.any(-1)

    def pad(self, ids: Tensor) -> Tensor:
        """(B, T) ids with padding after the block in which a criterion was met, and after the first end-of-text."""
        after = self._after_end(ids)
        return ids if after is None else torch.where(after, self.options.pad_token_id, ids)

    def num_tokens(self, holes: Tensor, ids: Tensor) -> Tensor:
        """(B,) int64, the holes (B, T) that were filled, up to the row's end."""
        after = self._after_end(ids)
        return (holes if after is None else holes & ~after).sum(-1)

    def _after_end(self, ids: Tensor) -> Tensor | None:
        """(B, T) bool, what follows the end of its row; None while no row can have one."""
        after = None
        if self.ends is not None:
            after = torch.arange(ids.shape[1], device=ids.device) >= self.ends[:, None]
        if self.cuts:
            is_eos = self._is_eos(ids, slice(None))
            behind = (is_eos.cumsum(-1) - is_eos.long() > 0) & self.answer
            after = behind if after is None else after | behind
        return after

    def _is_eos(self, ids: Tensor, rows: Tensor | slice) -> Tensor:
        eos = torch.tensor(self.options.end_of_text, device=ids.device)
        return torch.isin(ids, eos) & self.answer[rows]


@dataclass
class Progress:
    """The whole batch while some of its rows have left: (B, T) ids, (B,) counts."""

    canvas: Canvas
    passes: Tensor  # (B,) int64, forward passes that a row had something to do in
    rows: Tensor  # (R,) int64, the rows still at work

    def update(self, live: Canvas) -> None:
        """Write the state of the live rows back."""
        if len(self.rows) == len(self.passes):
            self.canvas = live
            return
        merged = {name: getattr(self.canvas, name).index_copy(0, self.rows, getattr(live, name)) for name in _PER_ROW}
        self.canvas = replace(self.canvas, **merged)


_PER_ROW = ("ids", "holes", "num_edits", "num_remasked", "undefined")


def denoise(
    network: Network,
    sampler: Sampler,
    canvas: Canvas,
    finished: Finished,
    observe: Callable[[Tensor, int | None], None] | None = None,
) -> Progress:
    """Run a sampler to its end.

    Per step: 1. what the sampler needs, 2. the network there, 3. the sampler, 4. whoever watches, 5. rows that are done
    leave the batch.

    Args:
        network, sampler, finished: The parts.
        canvas: The sampler's first canvas.
        observe: Called after each step with the whole batch's ids (B, T), and with the end column of a block that the
            step completed, else None.
    """
    batch = canvas.ids.shape[0]
    progress = Progress(canvas, torch.zeros_like(canvas.num_edits), torch.arange(batch, device=canvas.ids.device))
    i = sampler.first_step(canvas)
    while i < sampler.steps:
        # 1.
        request = sampler.request(canvas, i)
        before, passes = canvas, network.num_forward_passes
        working = sampler.working_rows(canvas, i)
        # 2.
        logits, request = network.logits(canvas.ids, request, sampler)
        # 3.
        canvas = sampler.step(canvas, logits, request)
        progress.passes[progress.rows] += working * (network.num_forward_passes - passes)
        progress.update(canvas)
        following = sampler.next_step(before, canvas, i)
        block_end = sampler.block_end(i, following)
        # 4.
        if observe is not None:
            observe(progress.canvas.ids, block_end)
        # 5.
        done = _done(sampler, finished, before, canvas, progress, block_end, i)
        if done is not None and bool(done.any()):
            if bool(done.all()):
                break
            stay = (~done).nonzero().squeeze(-1)
            progress.rows, canvas = progress.rows[stay], canvas.select(stay)
            network.select(stay)
        i = following
    return progress


def _done(
    sampler: Sampler,
    finished: Finished,
    before: Canvas,
    after: Canvas,
    progress: Progress,
    block_end: int | None,
    i: int,
) -> Tensor | None:
    """(R,) bool, the rows that need no more steps; None where it was not asked."""
    reasons = [sampler.settled_rows(before, after, i)]
    if block_end is not None and finished.criteria:
        reasons.append(finished.after_block(progress.canvas.ids, progress.rows, block_end))
    if finished.leaves_at_end_of_text and (sampler.adaptive or i % _STEPS_BETWEEN_CHECKS == 0 or block_end is not None):
        reasons.append(finished.at_end_of_text(before, after, progress.rows))
    known = [reason for reason in reasons if reason is not None]
    return torch.stack(known).any(0) if known else None
