"""Requests for generated answers: settings of each, batches of equal settings, answers cut at their stop strings."""

import contextlib
import functools
import hashlib
import json
import logging
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lm_eval.api.instance import Instance
from torch import Tensor

from xdlm_hf.evaluation.arguments import Arguments, check_room, refuse_unrepeatable, task_settings
from xdlm_hf.evaluation.batches import Batches
from xdlm_hf.evaluation.checkpoint import Checkpoint
from xdlm_hf.evaluation.likelihood import seeded_generator
from xdlm_hf.evaluation.perturbation import Perturbation
from xdlm_hf.generation.resolution import draws_with

logger = logging.getLogger(__name__)

PERTURBATION = "perturbation"  # among a request's settings: `repetition` and `noise` of a perturbed answer


class _Asked(NamedTuple):
    """How a group of requests is answered."""

    settings: dict[str, Any]  # of `generate`
    stops: list[str]
    perturbation: Perturbation | None


class GenerationRequests:
    """Answers lm-eval's requests of type `generate_until`.

    Attributes:
        num_forward_passes: Of all batches so far.
    """

    def __init__(self, checkpoint: Checkpoint, arguments: Arguments, batches: Batches):
        self.checkpoint, self.arguments, self.batches = checkpoint, arguments, batches
        self.item_log = None if arguments.item_log is None else Path(arguments.item_log)
        self.num_forward_passes = 0
        self._warn_once = functools.cache(logger.warning)

    def answers(self, requests: Sequence[Instance]) -> Iterator[tuple[Sequence[int], list[str]]]:
        """Positions in `requests` of the rows of each batch, and their answers.

        Requests with equal settings share batches, longest prompts first, so that little is padded and the largest
        batch comes first. Answers that would depend on their batch are made one by one (`Arguments.batch_all`).

        Raises:
            ValueError: Before the first batch, if `stability` is set and an answer is drawn.
        """
        repeats = _repeats(requests)
        groups: dict[str, list[int]] = {}
        for n, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True, default=str), []).append(n)
        asked = [self._merge(requests[group[0]].args[1]) for group in groups.values()]
        if self.arguments.stability is not None:
            for one in asked:
                refuse_unrepeatable(self.checkpoint.model.generation_config, one.settings)
        for group, one in zip(groups.values(), asked, strict=True):
            group.sort(key=lambda n: (-len(self.checkpoint.encode(requests[n].args[0])), requests[n].args[0]))
            alone = self._depends_on_batch(one.settings) and not self.arguments.batch_all
            answer = functools.partial(self._timed_answers, requests, repeats, one)
            yield from self.batches.over(group, answer, at_most=1 if alone else None)

    def _timed_answers(
        self, requests: Sequence[Instance], repeats: Sequence[int], asked: _Asked, batch: Sequence[int]
    ) -> list[str]:
        """Answers to one batch of requests, whose cost is written to `item_log`."""
        start, passes = time.perf_counter(), self.num_forward_passes
        contexts = [requests[n].args[0] for n in batch]
        # Seeded by the batch alone: a batch of one makes its draws independent of all other requests.
        generator = seeded_generator(self.arguments.seed_of_draws, contexts, [repeats[n] for n in batch])
        answers = self._answer(contexts, asked, generator)
        if self.item_log is not None:
            seconds, passes = time.perf_counter() - start, self.num_forward_passes - passes
            self._log_items(contexts, seconds / len(contexts), passes)
        return answers

    def _log_items(self, contexts: Sequence[str], seconds: float, passes: int) -> None:
        """Appends a line for each answer of a batch: `seconds` of one row, forward passes of the batch."""
        with self.item_log.open("a", encoding="utf-8") as log:
            for context in contexts:
                digest = hashlib.sha256(context.encode()).hexdigest()
                cost = {"seconds": seconds, "forward_passes": passes, "batch_rows": len(contexts)}
                log.write(json.dumps({"prompt_hash": digest, **cost}) + "\n")

    def _answer(self, contexts: Sequence[str], asked: _Asked, generator: torch.Generator) -> list[str]:
        """Answers to one batch of prompts."""
        checkpoint, settings = self.checkpoint, asked.settings
        check_room(checkpoint.max_length, settings["max_new_tokens"])
        inputs = self._encode(contexts, checkpoint.max_length - settings["max_new_tokens"])
        with asked.perturbation.of(checkpoint.model) if asked.perturbation else contextlib.nullcontext():
            output = checkpoint.model.generate(**inputs, generator=generator, return_dict_in_generate=True, **settings)
        self.num_forward_passes += output.num_forward_passes
        # A task with `eos_token_id: []` cuts the whole answer by its own rules.
        decode = checkpoint.decode_raw if settings.get("eos_token_id") == [] else checkpoint.decode_until
        return [decode(ids, asked.stops) for ids in output.sequences[:, inputs["input_ids"].shape[1] :].tolist()]

    def _encode(self, contexts: Sequence[str], room: int) -> dict[str, Tensor]:
        """Left-padded ids and attention mask, (B, L); prompts longer than `room` tokens keep their end."""
        rows = [self.checkpoint.encode(context) for context in contexts]
        if max(map(len, rows)) > room:
            self._warn_once(
                f"prompts longer than {room} tokens lose their beginning (max_length={self.checkpoint.max_length})"
            )
        return self.checkpoint.pad([row[-room:] for row in rows])

    def _merge(self, asked: Mapping[str, Any]) -> _Asked:
        """How to answer requests that ask for these settings: the run's win over the task's."""
        device = asked.get(PERTURBATION)
        task, stops = task_settings({name: value for name, value in asked.items() if name != PERTURBATION})
        run = self.arguments.settings
        if self._in_force("sampler", run) == "ancestral" and not task.get("temperature"):
            task.pop("temperature", None)  # greedy, as tasks ask for, means nothing to a sampler that draws
        for name, value in run.items():
            # The default length is not the task's wish.
            if name in task and task[name] != value and (name != "max_new_tokens" or _asks_length(asked)):
                self._warn_once(f"the task asks for {name}={task[name]}, the run for {name}={value}: the run's is used")
        perturbation = Perturbation(**device, seed=self.arguments.seed_of_draws) if device else None
        return _Asked({**task, **run}, stops, perturbation)

    def _in_force(self, name: str, settings: Mapping[str, Any]) -> Any:
        """A setting of `generate`; by default the value in the checkpoint's generation_config.json."""
        return settings[name] if name in settings else getattr(self.checkpoint.model.generation_config, name, None)

    def _depends_on_batch(self, settings: Mapping[str, Any]) -> bool:
        """Whether an answer depends on the other rows: it is drawn, or the released sampler edits its padding."""
        drawn = draws_with(self.checkpoint.model.generation_config, settings)
        return drawn or bool(self._in_force("reference_compat", settings))


def _repeats(requests: Sequence[Instance]) -> list[int]:
    """How often each request came before in the list; lm-eval repeats a request by listing the same object again."""
    seen: Counter[int] = Counter()
    numbers = []
    for request in requests:
        numbers.append(seen[id(request)])
        seen[id(request)] += 1
    return numbers


def _asks_length(asked: Mapping[str, Any]) -> bool:
    return any(name in asked for name in ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens"))
