"""Batches of requests, and their size: fixed, or halved whenever the device's memory does not suffice."""

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from accelerate.utils.memory import should_reduce_batch_size

from xdlm_hf.evaluation.arguments import Arguments

logger = logging.getLogger(__name__)

AUTO_BATCH_SIZE = {"cpu": 8, "other": 64}  # what `batch_size=auto` tries first; a CPU gains nothing from more


class Batches:
    """Splits requests into batches.

    Attributes:
        size: Rows of a batch. With `batch_size=auto` it is halved when a batch does not fit into memory, and stays so.
    """

    def __init__(self, arguments: Arguments, device: torch.device):
        self.automatic = arguments.batch_size == "auto"
        first = arguments.max_batch_size or AUTO_BATCH_SIZE["cpu" if device.type == "cpu" else "other"]
        self.size = first if self.automatic else arguments.batch_size

    def over(
        self, items: Sequence[Any], work: Callable[[Sequence[Any]], Any], at_most: int | None = None
    ) -> Iterator[tuple[Sequence[Any], Any]]:
        """(batch, `work(batch)`) for consecutive batches of `items`, of `at_most` rows where that is given."""
        start = 0
        while start < len(items):
            batch = items[start : start + min(self.size, at_most or self.size)]
            try:
                result = work(batch)
            except RuntimeError as error:
                self.halve(len(batch), error)
                continue
            start += len(batch)
            yield batch, result

    def halve(self, rows: int, error: RuntimeError) -> None:
        """Halves the size if `error` says that `rows` rows exceed the memory and the size is automatic.

        Raises:
            RuntimeError: `error` itself in every other case, and if a single row exceeds the memory.
        """
        if not self.automatic or rows == 1 or not should_reduce_batch_size(error):
            raise error
        self.size = (rows + 1) // 2
        logger.warning("out of memory with %d rows: batch_size=%d from here on", rows, self.size)
