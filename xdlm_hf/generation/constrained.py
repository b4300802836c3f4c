"""Confidence sampler whose answers are words of a language, such as JSON by a schema.

The network predicts all positions at once, so the prediction of a step is the most probable whole answer of the
language under the product of the distributions of the positions (Viterbi), not the most probable token of each:

    x_0 = argmax over x in the language, x agreeing with the tokens that stand, of sum_p log p_p(x_p)

Above temperature 0 it is a draw from that product, tempered, given the language. The step then commits some of its
tokens as `ConfidenceSampler` does.

**Every answer is in the language.** After each step the tokens that stand agree with some word of the language, the
witness. This holds before the first step, when no token stands and the canvas has room for a word. A step that edits
nothing has one prediction, which agrees with the tokens that stand; it fills holes from it and may turn tokens into
holes, so the prediction is the next witness. A step that may edit predicts twice. The first prediction also frees the
tokens that may be edited; from it the policy chooses the edits. Not all of them need to fit the tokens that stay, so
the second prediction is made with those fixed, holes free, and the chosen positions free to hold the current token or
the edit. The last witness meets these conditions, so there is such a prediction. Fills and edits are taken from it, and
it is the next witness. When no hole is left, the canvas is its witness.

Shapes: B batch, L columns of the answer, C classes of tokens, N vocabulary.
"""

import functools
import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..diffusion.categorical import draw_from_weights, row_slices, uniform
from ..diffusion.checks import work_dtype
from .canvas import Canvas, StepView
from .confidence import ConfidenceSampler, ConfidenceSettings
from .json_schema import schema_automaton
from .options import Options
from .refinement import most_confident
from .sampler import Request
from .token_automaton import TokenAutomaton, Vocabulary

# Logits that are converted at a time: a piece takes an operation for each class of several tokens.
_BLOCK_ELEMENTS = {"cpu": 2**22, "other": 2**26}


def answer_automaton(options: Options, tokenizer: Any, size: int, device: torch.device) -> TokenAutomaton | None:
    """The language of `json_schema`, if the options have one; the last ones are kept.

    Args:
        options: The resolved options.
        tokenizer: The model's.
        size: N.
        device: Of the logits.

    Raises:
        ValueError: If the tokenizer or the options do not fit, or the automaton is too large.
    """
    if options.json_schema is None:
        return None
    if not options.end_of_text:
        raise ValueError("json_schema needs eos_token_id, with which an answer ends; pass one.")
    given = options.json_schema
    schema = given if isinstance(given, str) else json.dumps(given)
    padding = () if options.pad_token_id is None else (options.pad_token_id,)
    excluded = (options.mask_token_id, *(options.suppress_tokens or ()))
    return _token_automaton(
        schema, Vocabulary.of(tokenizer), size, tuple(options.end_of_text), padding, excluded, device
    )


@functools.lru_cache(maxsize=16)
def _token_automaton(
    schema: str,
    vocabulary: Vocabulary,
    size: int,
    ends: tuple[int, ...],
    padding: tuple[int, ...],
    excluded: tuple[int, ...],
    device: torch.device,
) -> TokenAutomaton:
    return TokenAutomaton(schema_automaton(schema), vocabulary, size, ends, padding, excluded).to(device)


class ConstrainedSampler(ConfidenceSampler):
    """`ConfidenceSampler` for answers of a language, in one block.

    A token of probability 0 (a logit of -inf) is taken only if no word of the language avoids it.

    Args:
        automaton: The language, which excludes the mask token.
        settings, start, length, generator: As for `ConfidenceSampler`, without `block_length` and `warp`.

    Raises:
        ValueError: If no word of the language fits `length` tokens.
    """

    def __init__(
        self,
        automaton: TokenAutomaton,
        settings: ConfidenceSettings,
        start: int,
        length: int,
        generator: torch.Generator | None = None,
    ):
        super().__init__(settings, start, length, generator)
        if length < automaton.shortest:
            raise ValueError(
                f"max_new_tokens={length} is too short for json_schema: its shortest answer has {automaton.shortest} "
                "tokens; raise max_new_tokens."
            )
        self.automaton = automaton

    def step(self, canvas: Canvas, logits: Tensor, request: Request) -> Canvas:
        self._scores = StepScores(self, logits)
        try:
            return super().step(canvas, logits, request)
        finally:
            del self._scores

    def _predictions(
        self, logits: Tensor, ids: Tensor, holes: Tensor, editable: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        free = holes | editable if self.may_edit else holes
        predicted = self._scores.prediction(ids, free)
        return predicted, self._scores.confidence(predicted), self._scores.confidence(ids)

    def _agreeing(
        self, view: StepView, fill: Tensor, edit: Tensor, remasked: Tensor
    ) -> tuple[StepView, Tensor, Tensor]:
        if not self.may_edit:
            return view, fill, edit
        predicted = self._scores.prediction(view.ids, view.holes, edit, view.predicted)
        view = replace(view, predicted=predicted, conf_predicted=self._scores.confidence(predicted))
        # As many as planned: the policy has counted them for its budget.
        priority = view.conf_predicted
        if self.settings.remasking == "random":
            return view, fill, edit & (predicted != view.ids)
        return view, most_confident(priority, view.holes, fill.sum(-1)), edit & (predicted != view.ids)


class StepScores:
    """The distributions of one step, and predictions under them."""

    def __init__(self, sampler: ConstrainedSampler, logits: Tensor):
        self.automaton, self.temperature = sampler.automaton, sampler.settings.temperature
        self.generator, self.mask_token_id = sampler.generator, sampler.settings.mask_token_id
        self.shape, self.logits = logits.shape[:2], logits.flatten(0, 1)
        rows, wide = len(self.logits), work_dtype(logits)
        self.top, self.total = (torch.empty(rows, 1, dtype=wide, device=logits.device) for _ in range(2))
        self.classes = torch.empty(rows, self.automaton.num_classes, dtype=wide, device=logits.device)
        for part in self._parts():
            block = self.logits[part].to(wide, copy=True)
            block[:, self.mask_token_id] = -torch.inf
            self.top[part] = block.amax(-1, keepdim=True)
            block -= self.top[part]  # differences first, so that a small temperature cannot overflow
            self.classes[part] = self.automaton.class_scores(self._tempered(block), self.temperature > 0)
            self.total[part] = block.exp_().sum(-1, keepdim=True)

    def _parts(self) -> Iterator[slice]:
        return row_slices(len(self.logits), self.logits.shape[-1], self.logits.device, _BLOCK_ELEMENTS)

    def _tempered(self, scores: Tensor) -> Tensor:
        return scores / self.temperature if self.temperature > 0 else scores

    def prediction(self, ids: Tensor, free: Tensor, edit: Tensor | None = None, wanted: Tensor | None = None) -> Tensor:
        """The best or a drawn word of the language, (B, L).

        Args:
            ids: (B, L), the tokens that stand where `free` is False.
            free: (B, L) bool, positions that may take any token.
            edit: (B, L) bool, positions that hold the token of `ids` or `wanted`.
            wanted: (B, L).
        """
        class_of = self.automaton.class_of
        scores = self.classes.view(*self.shape, -1).masked_fill(~free[..., None], -torch.inf)
        # Where the canvas has a hole the id is the mask, which has no class.
        scores = self._allow(scores, ids, ~free)
        if edit is not None:
            scores = self._allow(scores, wanted, edit)
        u = None
        if self.temperature > 0:
            u = uniform((*self.shape, 3), self.generator, scores.device)
        classes = self.automaton.path(scores, None if u is None else u[..., :2])
        tokens = self._tokens(classes, None if u is None else u[..., 2])
        kept = torch.where(free, tokens, ids)
        return kept if edit is None else torch.where(edit & (class_of[wanted] == classes), wanted, kept)

    def _allow(self, scores: Tensor, tokens: Tensor, where: Tensor) -> Tensor:
        """Scores (B, L, C) with those of the tokens (B, L) for their classes, at some positions."""
        index = self.automaton.class_of[tokens].clamp_min(0)[..., None]
        own = self._tempered(self._differences(tokens)).nan_to_num(nan=-1e9).clamp_min(-1e9)[..., None]
        return scores.scatter(-1, index, torch.where(where[..., None], own, scores.gather(-1, index)))

    def _differences(self, tokens: Tensor) -> Tensor:
        """(B, L), the logits of tokens, less the largest of their positions."""
        return (self.logits.gather(-1, tokens.view(-1, 1)).to(self.top.dtype) - self.top).view(self.shape)

    def _tokens(self, classes: Tensor, u: Tensor | None) -> Tensor:
        """The best or a drawn token of each class, (B, L)."""
        classes, tokens = classes.flatten(), torch.empty(classes.numel(), dtype=torch.long, device=classes.device)
        for part in self._parts():
            block = self.logits[part].to(self.top.dtype) - self.top[part]
            block = self._tempered(block).nan_to_num_(nan=-1e9).clamp_min_(-1e9)
            block.masked_fill_(self.automaton.class_of != classes[part, None], -torch.inf)
            if u is None:
                tokens[part] = block.max(-1).indices
            else:
                weights = block.sub_(block.amax(-1, keepdim=True)).exp_()
                tokens[part] = draw_from_weights(weights, u.flatten()[part, None])
        return tokens.view(self.shape)

    def confidence(self, tokens: Tensor) -> Tensor:
        """(B, L), probabilities of tokens under the untempered softmax without the mask."""
        return self._differences(tokens).exp() / self.total.view(self.shape)
