"""Requests for likelihoods: bounds in batches, and whether greedy decoding gives the continuation."""

import functools
import logging
from collections.abc import Iterator, Sequence
from typing import Any

from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from xdlm_hf.evaluation.arguments import Arguments
from xdlm_hf.evaluation.batches import Batches
from xdlm_hf.evaluation.checkpoint import Checkpoint
from xdlm_hf.evaluation.likelihood import Estimate, Pair, log_likelihoods
from xdlm_hf.generation.protocol import default_mixing_ratio

logger = logging.getLogger(__name__)


class LikelihoodRequests:
    """Answers lm-eval's requests of type `loglikelihood` and `loglikelihood_rolling`, given as token ids.

    Attributes:
        estimates: Everything estimated by this process so far.
    """

    def __init__(self, checkpoint: Checkpoint, arguments: Arguments, batches: Batches):
        self.checkpoint, self.arguments, self.batches = checkpoint, arguments, batches
        self.estimates: list[Estimate] = []
        self._warn_once = functools.cache(logger.warning)

    def pair(self, context: Sequence[int], continuation: Sequence[int]) -> Pair:
        """A request that fits the model: a context that is too long loses its beginning, with one warning.

        Raises:
            ValueError: If the continuation alone is longer than the model.
        """
        max_length = self.checkpoint.max_length
        room = max_length - len(continuation)
        if room < 0:
            raise ValueError(f"a continuation of {len(continuation)} tokens is longer than max_length={max_length}")
        if len(context) > room:
            self._warn_once(f"contexts lose their beginning (max_length={max_length})")
            context = context[len(context) - room :]
        return Pair(tuple(context), tuple(continuation))

    def windows(self, ids: list[int]) -> list[Pair]:
        """A text in windows of `max_length` tokens; each token is scored in one of them, after at least one other."""
        start = self.checkpoint.tokenizer.eos_token_id
        windows = get_rolling_token_windows(ids, start, self.checkpoint.max_length - 1, context_len=1)
        return [Pair(*map(tuple, make_disjoint_window(window))) for window in windows]

    def bounds(self, pairs: Sequence[Pair]) -> Iterator[Estimate]:
        """Likelihood bounds in nats, in the order of `pairs`."""
        own, asked = default_mixing_ratio(self.checkpoint.model.config), self.arguments.mixing_ratio
        if asked not in (None, own):
            self._warn_once(f"likelihoods are bounds under mixing_ratio={asked}; the checkpoint was trained at {own}")
        done = 0
        while done < len(pairs):
            values = log_likelihoods(
                self.checkpoint.model,
                pairs[done:],
                self.arguments.mc_samples,
                self.batches.size,
                self.arguments.seed_of_draws,
                self.checkpoint.pad_token_id,
                asked,
            )
            try:
                for value in values:
                    done += 1
                    self.estimates.append(value)
                    yield value
            except RuntimeError as error:
                self.batches.halve(self.batches.size, error)

    def are_greedy(self, pairs: Sequence[Pair]) -> list[bool]:
        """Whether greedy decoding gives the continuation: one token per step, the most confident position first."""
        greedy = [False] * len(pairs)
        if getattr(self.checkpoint.model.config, "mask_token_id", None) is None:
            return greedy
        for length in sorted({len(pair.continuation) for pair in pairs} - {0}):
            group = [n for n, pair in enumerate(pairs) if len(pair.continuation) == length]
            decode = functools.partial(self._greedy_ids, pairs, length)
            for batch, decoded in self.batches.over(group, decode):
                for n, ids in zip(batch, decoded, strict=True):
                    greedy[n] = tuple(ids) == pairs[n].continuation
        return greedy

    def _greedy_ids(self, pairs: Sequence[Pair], length: int, batch: Sequence[int]) -> list[list[int]]:
        options: dict[str, Any] = {"sampler": "confidence", "temperature": 0.0, "eos_token_id": []}
        if self.arguments.mixing_ratio is not None:
            options["mixing_ratio"] = self.arguments.mixing_ratio
        lengths = {"max_new_tokens": length, "steps": length, "block_length": length}
        inputs = self.checkpoint.pad([pairs[n].context for n in batch])
        output = self.checkpoint.model.generate(**inputs, **lengths, **options)
        return output[:, -length:].tolist()

    def summary(self) -> dict[str, float]:
        """How many likelihoods this process estimated, and their standard errors in nats."""
        errors = [estimate.standard_error for estimate in self.estimates]
        if not errors:
            return {"count": 0}
        return {
            "count": len(errors),
            "mean_standard_error": sum(errors) / len(errors),
            "max_standard_error": max(errors),
        }
