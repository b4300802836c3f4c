"""The request queue of `xdlm-serve`, and the thread that runs the model on batches of requests with equal settings.

A request becomes a `Job`, with one row of a batch for each answer. Its events arrive on an asyncio queue: pieces of
final text, and drafts if it asked for them, then `Done` or an error. A batch stops once each of its rows is finished
(end of text, stop string) or cancelled. Answers, texts with a hole before a suffix, and revisions have batches of their
own, since their settings differ.

Shapes: B rows of a batch, P prompt, n columns of a block.
"""

import asyncio
import collections
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from ..generation.layout import padded
from ..loading import end_ids, end_of_turn_ids
from .answers import Answer, Revision
from .drafts import Draft, DraftRecorder
from .fields import RequestError
from .requests import GenerationRequest

logger = logging.getLogger(__name__)
SECONDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250)
ROWS = (1, 2, 4, 8, 16, 32, 64)
DRAFTS_KEPT = 64  # of one job, for a client that reads more slowly than the steps come


@dataclass(frozen=True)
class Piece:
    """Text of one answer that is final."""

    index: int
    text: str
    finish_reason: str | None


@dataclass(frozen=True)
class Done:
    """Every answer of the job is finished."""


Event = Piece | Draft | Done | RequestError


class Metrics:
    """The figures of /metrics, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        common = {"registry": self.registry}
        self.requests = Counter("xdlm_requests", "HTTP requests, by path and status", ["path", "status"], **common)
        self.cancelled = Counter("xdlm_cancelled", "Requests whose client went away", **common)
        self.prompt_tokens = Counter("xdlm_prompt_tokens", "Prompt tokens of requests answered", **common)
        self.completion_tokens = Counter("xdlm_completion_tokens", "Answer tokens of requests answered", **common)
        self.steps = Counter("xdlm_steps", "Denoising steps run, whatever the number of rows", **common)
        self.waiting = Gauge("xdlm_waiting_requests", "Requests in the queue", **common)
        self.running = Gauge("xdlm_running_rows", "Answers being generated", **common)
        self.batch_rows = Histogram("xdlm_batch_rows", "Answers per batch", buckets=ROWS, **common)
        self.seconds = Histogram("xdlm_request_seconds", "From queue to last token", buckets=SECONDS, **common)


@dataclass(eq=False)
class Job:
    """A request in the engine; made by `Engine.submit` on the event loop that reads `events`."""

    request: GenerationRequest
    answers: list[Answer | Revision]
    loop: asyncio.AbstractEventLoop
    events: asyncio.Queue[Event | type[Draft]] = field(default_factory=asyncio.Queue)
    drafts: collections.deque[Draft] = field(default_factory=lambda: collections.deque(maxlen=DRAFTS_KEPT))
    submitted: float = field(default_factory=time.monotonic)
    cancelled: bool = False
    over: bool = False  # its last event was posted

    @property
    def wanted(self) -> bool:
        return not self.cancelled and not self.over

    @property
    def completion_tokens(self) -> int:
        return sum(answer.tokens for answer in self.answers)

    def post(self, event: Event) -> None:
        """From the engine's thread; dropped once the loop is closed."""
        self.over |= not isinstance(event, Piece | Draft)
        try:
            self.loop.call_soon_threadsafe(self._receive, event)
        except RuntimeError:
            self.cancelled = True

    def _receive(self, event: Event) -> None:
        """Queue an event, on the loop. The class `Draft` stands for the oldest draft that is kept."""
        if isinstance(event, Draft):
            full = len(self.drafts) == DRAFTS_KEPT
            self.drafts.append(event)  # drops the oldest one if it is full, whose place in the queue stays
            if full:
                return
            event = Draft
        self.events.put_nowait(event)

    async def next_event(self) -> Event:
        event = await self.events.get()
        return self.drafts.popleft() if event is Draft else event


class Engine:
    """Runs jobs, oldest first, in batches with other waiting jobs of equal settings.

    Args:
        model, tokenizer: The model is used by the engine's thread alone.
        max_batch_rows: Answers generated together.
        max_queue: Jobs that may wait.
        batch_wait: Seconds that a batch which is not full waits for more.
        metrics: Updated by the engine; by default new ones.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        max_batch_rows: int = 8,
        max_queue: int = 64,
        batch_wait: float = 0.01,
        metrics: Metrics | None = None,
    ):
        self.model, self.tokenizer = model, tokenizer
        self.max_batch_rows, self.max_queue, self.batch_wait = max_batch_rows, max_queue, batch_wait
        self.metrics = Metrics() if metrics is None else metrics
        self.ends = end_ids(model, tokenizer)
        self.turn_ends = self.ends | end_of_turn_ids(tokenizer)
        self._pad_token_id = next(iter(self.ends), 0) if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        self._waiting: collections.deque[Job] = collections.deque()
        self._changed = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._work, name="xdlm-engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self, timeout: float = 30) -> None:
        """Stop the batch at its next step, refuse waiting jobs, and wait for the thread."""
        with self._changed:
            self._stopping = True
            waiting = list(self._waiting)
            self._waiting.clear()
            self._changed.notify_all()
        for job in waiting:
            job.post(_shutting_down())
        if self._thread.is_alive():
            self._thread.join(timeout)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and not self._stopping

    @property
    def queue_length(self) -> int:
        return len(self._waiting)

    def submit(self, request: GenerationRequest) -> Job:
        """Queue a request; call it on the event loop.

        Raises:
            RequestError: 429 if the queue is full, 503 if the engine has stopped.
        """
        job = Job(request, [self._answer(request) for _ in range(request.rows)], asyncio.get_running_loop())
        with self._changed:
            if not self.alive:
                raise _shutting_down()
            if len(self._waiting) >= self.max_queue:
                raise RequestError(
                    f"{self.max_queue} requests are waiting, the most that this server queues; try again later.",
                    429,
                    code="queue_full",
                    kind="rate_limit_error",
                )
            self._waiting.append(job)
            self._note_queue()
            self._changed.notify_all()
        return job

    def _answer(self, request: GenerationRequest) -> Answer | Revision:
        if request.settings.task == "revision":
            return Revision(self.tokenizer, sum(request.editable))
        ends = self.turn_ends if request.chat else self.ends
        return Answer(self.tokenizer, ends, request.stops, request.settings.max_new_tokens)

    def cancel(self, job: Job) -> None:
        """Cancel a job; no effect once it is over."""
        with self._changed:
            if not job.wanted:
                return
            job.cancelled = True
            self.metrics.cancelled.inc()
            if job in self._waiting:
                self._waiting.remove(job)
                self._note_queue()

    # ----------------------------------------------------------------------------------------------------------------
    # The engine's thread

    def _work(self) -> None:
        while (batch := self._next_batch()) is not None:
            if not batch:
                continue
            self.metrics.batch_rows.observe(sum(job.request.rows for job in batch))
            try:
                self._generate(batch)
            except _BatchOver:
                pass
            except ValueError as error:  # generate() refuses the settings, which are the same for all of the batch
                _fail(batch, RequestError(str(error)))
            except Exception as error:  # e.g. out of memory; the next batch may succeed
                logger.exception("a batch failed")
                _fail(batch, RequestError(f"generation failed: {type(error).__name__}", 500, kind="server_error"))
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
            finally:
                self.metrics.running.set(0)
                if self._stopping:
                    _fail(batch, _shutting_down())

    def _next_batch(self) -> list[Job] | None:
        """The oldest job with all that fit beside it; empty if it was cancelled, None when the engine stops."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._stopping)
            if self._stopping:
                return None
            if self.batch_wait and len(self._take()) == len(self._waiting):
                self._changed.wait_for(lambda: self._full() or self._stopping, self.batch_wait)
            if self._stopping:
                return None
            batch = self._take()
            for job in batch:
                self._waiting.remove(job)
            self._note_queue()
        return batch

    def _take(self) -> list[Job]:
        batch: list[Job] = []
        rows = 0
        for job in self._waiting:
            first = batch[0].request.settings if batch else job.request.settings
            if batch and not (first.shares_batches and job.request.settings == first):
                continue
            if not batch or rows + job.request.rows <= self.max_batch_rows:
                batch.append(job)
                rows += job.request.rows
        return batch

    def _full(self) -> bool:
        return sum(job.request.rows for job in self._take()) >= self.max_batch_rows

    def _note_queue(self) -> None:
        self.metrics.waiting.set(len(self._waiting))

    def _generate(self, batch: list[Job]) -> None:
        settings = batch[0].request.settings
        answers = [(job, index) for job in batch for index in range(job.request.rows)]
        texts, changing = zip(*(job.request.canvas(index) for job, index in answers), strict=True)
        input_ids, attention_mask = padded(texts, self._pad_token_id)
        positions = padded(changing, 0)[0].bool()
        padding = (attention_mask == 0).sum(-1).tolist()
        rows = [
            _Row(job, index, job.request.columns(index, pad))
            for (job, index), pad in zip(answers, padding, strict=True)
        ]
        options = {
            "attention_mask": attention_mask,
            "streamer": self._streamer(rows),
            "num_return_sequences": 1,
            **settings.options(),
        }
        if settings.task == "revision":
            self.model.revise(input_ids, editable=positions, **options)
        elif settings.task == "holes":
            self.model.generate(input_ids=input_ids, holes=positions, **options)
        else:
            if settings.json_schema is not None:
                # A model of conversations may end its JSON with either token; Answer finds both.
                options["eos_token_id"] = sorted(self.turn_ends)
            self.model.generate(input_ids=input_ids, reference_compat=False, tokenizer=self.tokenizer, **options)

    def _streamer(self, rows: list["_Row"]) -> "_JobStreamer":
        """One that records no drafts where nobody asked for them."""
        arguments = (rows, self.metrics, lambda: self._stopping)
        if any(row.job.request.drafts for row in rows):
            return _DraftStreamer(*arguments, self.model.config.mask_token_id)
        return _JobStreamer(*arguments)


class _BatchOver(Exception):
    """Raised by the streamer to leave `generate` when each row is finished or cancelled."""


@dataclass(frozen=True)
class _Row:
    """A row of a batch: an answer of a job, and its columns in what the streamer gets."""

    job: Job
    index: int
    columns: slice

    @property
    def wanted(self) -> bool:
        return self.job.wanted and self.job.answers[self.index].finish_reason is None


class _JobStreamer(BaseStreamer):
    """Passes the final columns of a batch to its jobs, row by row."""

    def __init__(self, rows: list[_Row], metrics: Metrics, stopping: Callable[[], bool]):
        self.rows, self.metrics, self.stopping = rows, metrics, stopping
        self.prompt = True

    def put(self, value: Tensor) -> None:
        if self.prompt:
            self.prompt = False
        else:
            for row, ids in zip(self.rows, value.tolist(), strict=True):
                self._feed(row, ids[row.columns])
        self._check()

    def put_draft(self, value: Tensor) -> None:
        self.metrics.steps.inc()
        self._check()

    def end(self) -> None:
        pass

    def _feed(self, row: _Row, ids: list[int]) -> None:
        if not row.wanted:
            return
        job, answer = row.job, row.job.answers[row.index]
        text = answer.feed(ids)
        if text or answer.finish_reason is not None:
            job.post(Piece(row.index, text, answer.finish_reason))
        if all(other.finish_reason is not None for other in job.answers):
            self.metrics.prompt_tokens.inc(job.request.prompt_tokens)
            self.metrics.completion_tokens.inc(job.completion_tokens)
            self.metrics.seconds.observe(time.monotonic() - job.submitted)
            job.post(Done())

    def _check(self) -> None:
        wanted = sum(row.wanted for row in self.rows)
        self.metrics.running.set(wanted)
        if not wanted or self.stopping():
            raise _BatchOver


class _DraftStreamer(_JobStreamer):
    """Also posts the answer after each step to the jobs that asked for drafts."""

    def __init__(self, rows: list[_Row], metrics: Metrics, stopping: Callable[[], bool], mask_token_id: int | None):
        super().__init__(rows, metrics, stopping)
        self.recorder = DraftRecorder(mask_token_id)

    def put_confidences(self, value: Tensor) -> None:
        self.recorder.add_confidences(value)

    def put_draft(self, value: Tensor) -> None:
        self.recorder.add(value)
        for number, row in enumerate(self.rows):
            if row.job.request.drafts and row.wanted:
                row.job.post(self.recorder.draft(row.index, number, row.columns))
        super().put_draft(value)


def _fail(batch: list[Job], error: RequestError) -> None:
    for job in batch:
        if job.wanted:
            job.post(error)


def _shutting_down() -> RequestError:
    return RequestError("the server is shutting down.", 503, kind="server_error")
