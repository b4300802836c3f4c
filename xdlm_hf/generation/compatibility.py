"""Objects and options of Transformers' `generate` that assume decoding from left to right.

Stop strings and `max_length` get their meaning for a canvas here. Logits processors and stopping criteria that read the
last token as the newest one would be silently wrong, so those of Transformers are refused.

Shapes: B batch, T total length (prompt and answer).
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers.generation import StopStringCriteria

from .options import Options

# By name, because the set differs between versions of Transformers. Each reads the end of `input_ids` as the text
# before the token that `scores` are about, or its length as a position; here `input_ids` is the whole canvas.
_LEFT_TO_RIGHT = frozenset(
    {
        "AlternatingCodebooksLogitsProcessor",
        "ClassifierFreeGuidanceLogitsProcessor",
        "EncoderNoRepeatNGramLogitsProcessor",
        "ExponentialDecayLengthPenalty",
        "ForcedBOSTokenLogitsProcessor",
        "ForcedEOSTokenLogitsProcessor",
        "MinLengthLogitsProcessor",
        "MinNewTokensLengthLogitsProcessor",
        "NoRepeatNGramLogitsProcessor",
        "PrefixConstrainedLogitsProcessor",
        "SuppressTokensAtBeginLogitsProcessor",
        "SynthIDTextWatermarkLogitsProcessor",
        "UnbatchedClassifierFreeGuidanceLogitsProcessor",
        "WatermarkLogitsProcessor",
        "WhisperNoSpeechDetection",
        "WhisperTimeStampLogitsProcessor",
    }
)
# Criteria are called at the end of a block, so those that look at the last token alone miss what is inside it.
_LAST_TOKEN = {
    "EosTokenCriteria": "pass eos_token_id=... to generate()",
    "StopStringCriteria": "pass stop_strings=... and tokenizer=... to generate()",
    "ConfidenceCriteria": "leave it out",
}


def check_processors(processors: Any, criteria: Any) -> None:
    """Raise ValueError for logits processors and stopping criteria of Transformers that read from left to right."""
    for processor in processors or ():
        names = {cls.__name__ for cls in type(processor).__mro__}
        # A bias of single tokens holds at every position; one of several tokens depends on those before.
        several = any(len(tokens) > 1 for tokens in _bias_sequences(processor))
        if names & _LEFT_TO_RIGHT or several:
            raise ValueError(
                f"the logits processor {type(processor).__name__} reads the text from left to right"
                + (" for sequences of several tokens" if several else "")
                + ", but here all positions are predicted at once; leave it out. A processor may use the scores, and "
                "the whole text as a set of tokens."
            )
    for criterion in criteria or ():
        remedy = next((_LAST_TOKEN[c.__name__] for c in type(criterion).__mro__ if c.__name__ in _LAST_TOKEN), None)
        if remedy is not None:
            raise ValueError(
                f"the stopping criterion {type(criterion).__name__} reads the last token, but criteria are called once "
                f"for each block; {remedy}."
            )


def _bias_sequences(processor: Any) -> list[Any]:
    """Token sequences of a `SequenceBiasLogitsProcessor`, which it takes as a dict or as a list of pairs."""
    bias = getattr(processor, "sequence_bias", None) or ()
    return [entry if isinstance(bias, dict) else entry[0] for entry in bias]


def with_answer_length(options: Options, input_ids: Any) -> Options:
    """The options with `max_new_tokens` set to what `max_length` leaves after prompts (B, P).

    Raises:
        ValueError: If that is nothing.
    """
    if options.max_length is None:
        return options
    prompt = input_ids.shape[-1] if isinstance(input_ids, Tensor) and input_ids.ndim else 0
    if prompt >= options.max_length:
        raise ValueError(
            f"max_length={options.max_length} leaves no room for an answer after a prompt of {prompt} tokens; raise "
            "it, or pass max_new_tokens instead."
        )
    return replace(options, max_new_tokens=options.max_length - prompt)


class StopStrings:
    """Finds where stop strings are complete.

    Args:
        options: The resolved options, with `stop_strings`.
        tokenizer: The model's.

    Raises:
        ValueError: If there is no tokenizer, or no padding token for what follows the end of a row.
    """

    # Above every token id; `StopStringCriteria` gives such ids a row that matches nothing.
    _NO_TOKEN = torch.iinfo(torch.int32).max

    def __init__(self, options: Options, tokenizer: Any):
        if not callable(getattr(tokenizer, "get_vocab", None)):
            raise ValueError(
                f"stop_strings={options.stop_strings!r} need the model's tokenizer, not {type(tokenizer).__name__}; "
                "pass tokenizer=tokenizer."
            )
        if options.pad_token_id is None:
            raise ValueError("stop_strings need pad_token_id, to pad what follows the end of a row; pass one.")
        self.criterion = StopStringCriteria(tokenizer, options.stop_strings)

    def complete_at(self, ids: Tensor) -> Tensor:
        """(B, T) bool: tokens with which a stop string is complete; it may have begun in the prompt."""
        # The criterion looks at the end of each row, so each position gets the row that ends with it.
        width = self.criterion.maximum_token_len
        before = ids.new_full((len(ids), width - 1), self._NO_TOKEN)
        windows = torch.cat([before, ids], 1).unfold(1, width, 1)
        return self.criterion(windows.reshape(-1, width), None).view(ids.shape)


def stop_strings(options: Options, tokenizer: Any) -> StopStrings | None:
    """The stop strings of a call, if it has any."""
    return StopStrings(options, tokenizer) if options.stop_strings else None
