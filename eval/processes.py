"""One lm-eval model in several processes, as `accelerate launch` and `torchrun` start them."""

import os
from typing import Any

import torch
from accelerate import PartialState
from lm_eval.api.model import TemplateLM
from torch import Tensor


class ProcessesLM(TemplateLM):
    """What lm-eval asks of a model whose processes each hold it and take their share of the rows."""

    def _join(self, device: torch.device) -> torch.device:
        """Joins the other processes, if there are any; the device of this one."""
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return device
        state = PartialState(cpu=device.type == "cpu")
        self._rank, self._world_size = state.process_index, state.num_processes
        return state.device

    def all_gather(self, tensor: Tensor) -> Tensor:
        """(world size,) values of a scalar, in the order of the processes."""
        if self.world_size == 1:
            return tensor
        parts = [torch.empty_like(tensor.reshape(-1)) for _ in range(self.world_size)]
        torch.distributed.all_gather(parts, tensor.reshape(-1))
        return torch.cat(parts)

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
        """Every process's object on `dst`, None on the others."""
        if self.world_size == 1:
            return [obj]
        parts = [None] * self.world_size if self.rank == dst else None
        torch.distributed.gather_object(obj, parts, dst=dst)
        return parts and _in_order(parts)

    def barrier(self) -> None:
        if self.world_size > 1:
            torch.distributed.barrier()


def _in_order(parts: list[Any]) -> list[Any]:
    """Logged samples, which lm-eval strings together process by process, in the order of their rows; others as is."""
    groups = [group for part in parts if isinstance(part, dict) for group in part.values()]
    rows = [row for group in groups if isinstance(group, list) for row in group]
    if not rows or not all(isinstance(row, dict) and "doc_id" in row for row in rows):
        return parts
    merged = {
        task: sorted((row for part in parts for row in part[task]), key=lambda row: row["doc_id"]) for task in parts[0]
    }
    return [merged, *({task: [] for task in parts[0]} for _ in parts[1:])]
