"""Key-value cache for bidirectional denoising: a step recomputes some columns and reuses the others.

An autoregressive cache only grows. Here all positions attend to each other and any of them may change, and a changed
token makes the keys and values of all positions stale in every layer but the first. The cache is therefore an
approximation: columns that a step does not compute are those of the last full pass. With `refresh=1` every pass is
full, and the result is exact.

Shapes: B batch, T total length, A columns that a step computes, H key-value heads, W width of a head.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

CACHES = ("prefix", "dual")


class CanvasLayer(CacheLayerMixin):
    """Keys and values (B, H, T, W) of one attention layer, replaced in full or at some columns."""

    columns: Tensor | None = None  # (B, A), set by `CanvasCache.at` before a pass; None: a full pass

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store the keys and values of a pass, (B, H, T or A, W); return those of all T columns."""
        if self.columns is None:
            self.lazy_initialization(key_states, value_states)
            # contiguous(): a view would keep the projection's whole output in memory, and writes would change it.
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
    """Transformers' `Cache` for bidirectional denoising; the first pass must be full.

    Args:
        num_layers: Attention layers of the model.
    """

    def __init__(self, num_layers: int):
        super().__init__(layers=[CanvasLayer() for _ in range(num_layers)])

    def at(self, columns: Tensor | None) -> "CanvasCache":
        """Set the columns, (B, A), that the next pass computes; None: all.

        Raises:
            ValueError: If the cache is empty and `columns` is not None.
        """
        if columns is not None and not self.layers[0].is_initialized:
            raise ValueError("the cache is empty: run a full pass before one over some columns.")
        for layer in self.layers:
            layer.columns = columns
        return self


class RefreshPlan:
    """Columns that each step computes.

    A full pass is run at the start of each block, at the start of polishing and every `refresh` steps. Other steps
    compute the window, which is the block and, with "prefix", all columns after it, and also the columns outside the
    window that the sampler edited after the full pass, because their cached keys and values are those of the old token.

    Args:
        mode: "prefix" or "dual".
        refresh: Steps from one full pass to the next; None: full passes only at the start of blocks and polishing.
    """

    def __init__(self, mode: str, refresh: int | None):
        self.mode, self.refresh = mode, refresh
        self._stage: tuple[tuple[int, int], bool] | None = None
        self._age = 0
        self._before: Tensor | None = None  # (B, T) ids of the last full pass, until its edits are known
        self._edited: tuple[Tensor, Tensor] | None = None

    def columns(
        self, ids: Tensor, block: tuple[int, int], most_edited: int | None, polishing: bool = False
    ) -> tuple[Tensor, Tensor] | None:
        """Columns that a step on `ids` (B, T) in the columns [first, end) of `block` computes.

        `most_edited` is the largest number of columns outside the window that a step may have edited in a row; None: as
        many as there are.

        Returns:
            None for a full pass; else the columns (B, A), and a bool mask (B, C) of the first C of them, those that may
            change in this step. It is False where a column only pads a row to the number of columns of another.
        """
        # Polishing always starts with a full pass: otherwise a row would depend on when other rows start polishing.
        stage = (block, polishing)
        if stage != self._stage or (self.refresh is not None and self._age >= self.refresh):
            self._stage, self._age, self._before, self._edited = stage, 1, ids, None
            return None
        self._age += 1
        first, end = block
        last = ids.shape[1] if self.mode == "prefix" else end
        if self._edited is None:
            self._edited = self._find_edited(ids, block, last, most_edited)
        edited, counts = self._edited
        window = torch.arange(first, last, device=ids.device).expand(ids.shape[0], -1)
        inner, suffix = window[:, : end - first], window[:, end - first :]
        # From left to right, as without a cache: of equal confidences the lower position wins.
        columns = torch.cat([edited, inner, suffix], dim=1)
        valid = torch.cat([counts, torch.ones_like(inner, dtype=torch.bool)], dim=1)
        return columns, valid

    def _find_edited(
        self, ids: Tensor, block: tuple[int, int], last: int, most_edited: int | None
    ) -> tuple[Tensor, Tensor]:
        """Columns outside [first of the block, last) that changed since the full pass, (B, E), and which are valid.

        E is `most_edited`, or the number in the row with the most, which synchronizes with the device; called once per
        full pass.
        """
        changed = ids != self._before
        changed[:, block[0] : last] = False
        self._before = None
        most = int(changed.sum(-1).max()) if most_edited is None else most_edited
        order = changed.long().argsort(dim=-1, descending=True, stable=True)[:, :most]
        valid = changed.gather(1, order)
        # Padding repeats the block's last column, whose keys are then written twice with the same value.
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
            f"attn_implementation={attn_implementation!r} does not support the cache, which has fewer queries than "
            "keys; load the model with attn_implementation='sdpa' or 'eager', or leave out use_cache."
        )
