"""Keys and values of a whole canvas, computed anew where a step needs them.

An autoregressive cache grows at its end. Here every position exists from the start, each attends to all, and any of
them may change: a token filled anywhere makes the keys and values of all layers above the first stale everywhere. A
cache is thus an approximation: a step computes some columns and takes the others as they were at the last whole pass.
It is exact when every pass is whole (`refresh=1`).

Shapes: B batch, T whole length, A columns that a step computes, H key-value heads, W width of a head.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

CACHES = ("prefix", "dual")


class CanvasLayer(CacheLayerMixin):
    """Keys and values (B, H, T, W) of one attention layer: stored whole, or overwritten at some columns."""

    columns: Tensor | None = None  # (B, A), set by the owner before a pass; None: the pass is whole

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write what the pass computed, (B, H, T or A, W); return keys and values of the whole canvas."""
        if self.columns is None:
            self.lazy_initialization(key_states, value_states)
            # contiguous(): a view of the projection's output would be kept whole, and written through.
            self.keys, self.values = key_states.contiguous(), value_states.contiguous()
        else:
            # Layers may lie on several devices.
            where = self.columns.to(key_states.device)[:, None, :, None].expand_as(key_states)
            self.keys.scatter_(2, where, key_states)
            self.values.scatter_(2, where, value_states)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows of the batch, (rows,)."""
        indices = indices.to(self.keys.device)
        self.keys, self.values = self.keys[indices], self.values[indices]

    def get_seq_length(self) -> int:
        return self.keys.shape[-2] if self.is_initialized else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return (query_length if self.columns is None else self.get_seq_length()), 0

    def get_max_length(self) -> int:
        return self.get_seq_length() or -1


class CanvasCache(Cache):
    """Transformers' `Cache` for bidirectional denoising; a first pass without `at` must be whole.

    Args:
        num_layers: Attention layers of the model.
    """

    def __init__(self, num_layers: int):
        super().__init__(layers=[CanvasLayer() for _ in range(num_layers)])

    def at(self, columns: Tensor | None) -> "CanvasCache":
        """Say which columns, (B, A), the next pass computes; None: all.

        Raises:
            ValueError: If there is nothing yet that the other columns could be taken from.
        """
        if columns is not None and not self.layers[0].is_initialized:
            raise ValueError("the cache is empty: run a whole pass before one over some columns.")
        for layer in self.layers:
            layer.columns = columns
        return self


class RefreshPlan:
    """Which columns each step computes.

    A whole pass where a block or the polishing begins and every `refresh` steps; between them the window, which is the
    block and, with "prefix", everything behind it, and the columns outside the window that the whole pass made the
    sampler edit: their keys and values are those of another token until they are computed again.

    Args:
        mode: "prefix" or "dual".
        refresh: Steps from one whole pass to the next; None refreshes only where a block or the polishing begins.
    """

    def __init__(self, mode: str, refresh: int | None):
        self.mode, self.refresh = mode, refresh
        self._stage: tuple[tuple[int, int], bool] | None = None
        self._age = 0
        self._before: Tensor | None = None  # (B, T) ids of the last whole pass, until its edits are known
        self._edited: tuple[Tensor, Tensor] | None = None

    def columns(
        self, ids: Tensor, block: tuple[int, int], may_edit: bool, polishing: bool = False
    ) -> tuple[Tensor, Tensor, int] | None:
        """What a step on `ids` (B, T) in the columns [first, end) of `block` computes.

        Returns:
            None for a whole pass; else the columns (B, A), whether each counts (a row with fewer columns than another
            repeats one that does not), and how many of them, from the left, may change in this step.
        """
        # Polishing is a stage of its own also in the same columns: when it begins depends on how long other rows took.
        stage = (block, polishing)
        if stage != self._stage or (self.refresh is not None and self._age >= self.refresh):
            self._stage, self._age, self._before, self._edited = stage, 1, ids, None
            return None
        self._age += 1
        first, end = block
        last = ids.shape[1] if self.mode == "prefix" else end
        if self._edited is None:
            self._edited = self._find_edited(ids, block, last, may_edit)
        edited, counts = self._edited
        window = torch.arange(first, last, device=ids.device).expand(ids.shape[0], -1)
        inner, suffix = window[:, : end - first], window[:, end - first :]
        # From left to right, as without a cache: of equal confidences the lower position wins.
        columns = torch.cat([edited, inner, suffix], dim=1)
        valid = torch.cat([counts, torch.ones_like(inner, dtype=torch.bool)], dim=1)
        return columns, valid, valid.shape[1]

    def _find_edited(self, ids: Tensor, block: tuple[int, int], last: int, may_edit: bool) -> tuple[Tensor, Tensor]:
        """Columns outside [first of the block, last) that changed since the whole pass, (B, E), and which count.

        One wait for the device, for E, once per whole pass.
        """
        changed = ids != self._before
        changed[:, block[0] : last] = False
        self._before = None
        most = int(changed.sum(-1).max()) if may_edit else 0
        order = changed.long().argsort(dim=-1, descending=True, stable=True)[:, :most]
        valid = changed.gather(1, order)
        # What does not count repeats the block's last column, so that its keys are written twice with one value.
        return torch.where(valid, order, block[1] - 1), valid

    def select(self, rows: Tensor) -> None:
        """Keep some rows of the batch, (rows,)."""
        if self._before is not None:
            self._before = self._before[rows]
        if self._edited is not None:
            self._edited = tuple(x[rows] for x in self._edited)


def check_cache_attention(attn_implementation: str) -> None:
    """Raise ValueError for an attention implementation whose masks need as many queries as keys."""
    if attn_implementation not in ("eager", "sdpa"):
        raise ValueError(
            f"attn_implementation={attn_implementation!r} cannot take a cache, whose steps ask from some columns and "
            "attend to all; load the model with attn_implementation='sdpa' or 'eager', or leave out use_cache."
        )
