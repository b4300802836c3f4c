"""Collective operations that lm-eval asks of a model held by every process of `accelerate launch` or `torchrun`."""

import os
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather
from lm_eval.api.model import TemplateLM
from torch import Tensor


class DistributedLM(TemplateLM):
    """A model in several processes, each of which gets its share of the rows."""

    def _join_processes(self, device: torch.device) -> torch.device:
        """Joins the process group where there are several processes; returns the device of this one."""
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return device
        state = PartialState(cpu=device.type == "cpu")
        self._rank, self._world_size = state.process_index, state.num_processes
        return state.device

    def all_gather(self, tensor: Tensor) -> Tensor:
        """(world size,) values of a scalar, in the order of the processes."""
        return tensor if self.world_size == 1 else gather(tensor)

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
        """Every process's object on `dst`, None on the others; logged samples in the order of their rows."""
        if self.world_size == 1:
            return [obj]
        parts = [None] * self.world_size if self.rank == dst else None
        torch.distributed.gather_object(obj, parts, dst=dst)
        return parts and _sort_samples(parts)

    def barrier(self) -> None:
        if self.world_size > 1:
            PartialState().wait_for_everyone()


def _sort_samples(parts: list[Any]) -> list[Any]:
    """All logged samples of each task as the first part, sorted by row; any other objects unchanged.

    lm-eval concatenates the parts, which would leave the samples in the order of the processes.
    """
    groups = [group for part in parts if isinstance(part, dict) for group in part.values()]
    rows = [row for group in groups if isinstance(group, list) for row in group]
    if not rows or not all(isinstance(row, dict) and "doc_id" in row for row in rows):
        return parts
    merged = {
        task: sorted((row for part in parts for row in part[task]), key=lambda row: row["doc_id"]) for task in parts[0]
    }
    return [merged, *({task: [] for task in parts[0]} for _ in parts[1:])]
