"""Checkpoints on SIGTERM, by which schedulers preempt a job, and at intervals of time.

All processes decide together at the end of an optimizer step: SIGTERM may reach only one of them, and clocks differ.
With several processes this costs one reduction of two numbers per step.
"""

import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

logger = logging.getLogger(__name__)
PREEMPTED_STATUS = os.EX_TEMPFAIL  # 75: a temporary failure, try again


class Preempted(SystemExit):
    """Training was stopped by SIGTERM and saved. Uncaught, it ends a script with status 75."""

    def __init__(self, step: int, checkpoint: str):
        super().__init__(PREEMPTED_STATUS)
        self.step = step
        self.checkpoint = checkpoint

    def __str__(self) -> str:
        return (
            f"preempted: SIGTERM arrived, step {self.step} is saved in {self.checkpoint!r}. Start the same command "
            "with resume_from_checkpoint=auto to go on."
        )


class SaveOnRequest(TrainerCallback):
    """Asks for a checkpoint at the end of a step after SIGTERM, which also ends training, or after `save_seconds`.

    Signals are caught from the beginning of training until `release`, and only in the main thread, as Python requires.

    Args:
        save_seconds: Seconds from one checkpoint to the next, by the clock of the first process; None for no limit.
        all_sum: Sums a tensor over all processes.
        device: Device of that tensor.
    """

    def __init__(self, save_seconds: float | None, all_sum: Callable[[Tensor], Tensor], device: torch.device):
        self.save_seconds = save_seconds
        self.stopping = False  # agreed by all processes
        self._all_sum = all_sum
        self._device = device
        self._signalled = False
        self._saved_at = 0.0
        self._before: Any = None

    def catch_signals(self) -> None:
        """Install the handler of SIGTERM."""
        self.stopping = self._signalled = False
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._on_signal)

    def release(self) -> None:
        """Restore the former handler of SIGTERM."""
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
            self._before = None

    def _on_signal(self, number: int, frame: Any) -> None:
        self._signalled = True

    def on_train_begin(self, args, state, control, **kwargs):
        self._saved_at = time.monotonic()

    def on_save(self, args, state, control, **kwargs):
        self._saved_at = time.monotonic()

    def on_step_end(self, args, state, control, **kwargs):
        late = self.save_seconds is not None and time.monotonic() - self._saved_at >= self.save_seconds
        signalled, late = self._agreed(self._signalled, late and state.is_world_process_zero, args.world_size)
        if signalled:
            logger.warning("SIGTERM: saving after step %d and stopping.", state.global_step)
            # The time until SIGKILL is for saving.
            control.should_evaluate, control.should_training_stop, self.stopping = False, True, True
        control.should_save |= signalled or late

    def _agreed(self, signalled: bool, late: bool, processes: int) -> tuple[bool, bool]:
        """Whether any process was signalled, and whether it is late for the first."""
        if processes == 1:
            return signalled, late
        votes = torch.tensor([float(signalled), float(late)], device=self._device)
        any_signalled, any_late = (self._all_sum(votes) > 0).tolist()
        return any_signalled, any_late
