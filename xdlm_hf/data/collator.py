"""Rows to batches: padding and the mask of scored tokens."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass
class DiffusionCollator:
    """Rows of ids to one batch of clean text x_0, with masks of noised and scored tokens.

    A row is a mapping with `input_ids` and, for supervised fine-tuning, one of `labels` (-100 marks the prompt) or
    `prompt_mask` (true marks the prompt); optionally `token_weights` and `class_label`, an integer or None for
    no label. Prompt and padding are neither noised nor scored.

    The batch holds `input_ids` (B, L) int64; `noise_mask` (B, L) bool, true where noise may fall; `token_weights`
    (B, L) float32, 0 where noise may not fall; `class_labels` (B,) int64, if a row has a `class_label`, with
    `num_classes` (the null class) for rows without; and `attention_mask` (B, L) int64, only when a row is padded.

    Args:
        pad_token_id: Fills rows up to the longest.
        mask_token_id: When given, refused wherever noise may fall: the network can never predict it.
        num_classes: Number of classes of the model; None refuses rows with a `class_label`.

    Raises:
        ValueError: If lengths disagree, a weight is negative or falls on a protected position, both prompt markers are
            given, a label is neither -100 nor the token itself, the mask token occurs, or a `class_label` is not one of
            the model's classes.
    """

    pad_token_id: int
    mask_token_id: int | None = None
    num_classes: int | None = None

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        columns = [self._row(row) for row in rows]
        ids, noise_mask, weights = zip(*columns, strict=True)
        lengths = [len(row) for row in ids]
        batch = {
            "input_ids": _pad(ids, self.pad_token_id),
            "noise_mask": _pad(noise_mask, False),
            "token_weights": _pad(weights, 0.0),
        }
        if min(lengths) < max(lengths):
            batch["attention_mask"] = _pad([torch.ones(n, dtype=torch.int64) for n in lengths], 0)
        labels = [row.get("class_label") for row in rows]
        if any(label is not None for label in labels):
            batch["class_labels"] = torch.tensor([self._class(label) for label in labels], dtype=torch.int64)
        return batch

    def _class(self, label: Any) -> int:
        if self.num_classes is None:
            raise ValueError(f"a row has class_label={label!r}, but the model has no classes; remove the column.")
        if label is None:
            return self.num_classes
        if isinstance(label, bool) or label != int(label) or not 0 <= label < self.num_classes:
            raise ValueError(
                f"a row has class_label={label!r}; the model's classes are 0..{self.num_classes - 1}, and None is no "
                "label."
            )
        return int(label)

    def _row(self, row: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        ids = torch.as_tensor(row["input_ids"], dtype=torch.int64)
        noise_mask = torch.ones(len(ids), dtype=torch.bool)
        if "labels" in row and "prompt_mask" in row:
            raise ValueError("a row has both labels and prompt_mask; give one of them.")
        if "labels" in row:
            labels = _column("labels", row["labels"], torch.int64, ids)
            noise_mask = labels != -100
            if (labels != ids)[noise_mask].any():
                raise ValueError("labels must repeat input_ids or be -100 (prompt): a diffusion model does not shift.")
        if "prompt_mask" in row:
            noise_mask = ~_column("prompt_mask", row["prompt_mask"], torch.bool, ids)
        weights = noise_mask.float()
        if "token_weights" in row:
            weights = _column("token_weights", row["token_weights"], torch.float32, ids)
            if (weights < 0).any() or (weights[~noise_mask] != 0).any():
                raise ValueError("token_weights must not be negative, and must be 0 on the prompt: it is not noised.")
        if self.mask_token_id is not None and (ids[noise_mask] == self.mask_token_id).any():
            raise ValueError(
                f"a row holds the mask token (id {self.mask_token_id}) as text, which the network can never predict: "
                "encode text with split_special_tokens=True, or mark the position as prompt."
            )
        return ids, noise_mask, weights


def _column(name: str, values: Any, dtype: torch.dtype, ids: Tensor) -> Tensor:
    column = torch.as_tensor(values, dtype=dtype)
    if column.shape != ids.shape:
        raise ValueError(f"{name} has {len(column)} entries, input_ids {len(ids)}.")
    return column


def _pad(rows: Sequence[Tensor], value: float) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=value)
