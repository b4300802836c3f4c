"""Answers as text: ids, block by block, to text that can be sent; and revised texts, which are sent whole.

Sent text is never revised: an incomplete character is held back, and so is a possible beginning of a stop string.
"""

import bisect
from collections.abc import Iterable, Sequence

from transformers import PreTrainedTokenizerBase


class Revision:
    """A revised text, with the attributes of an `Answer`.

    Args:
        tokenizer: The model's.
        tokens: Tokens that may change.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, tokens: int):
        self.tokenizer, self.tokens = tokenizer, tokens
        self.text = ""
        self.finish_reason: str | None = None

    def feed(self, ids: Iterable[int]) -> str:
        """Take all ids of the text; return the text."""
        self.text, self.finish_reason = self.tokenizer.decode(list(ids), clean_up_tokenization_spaces=False), "stop"
        return self.text


class Answer:
    """One answer while it is generated.

    Args:
        tokenizer: The model's.
        ends: Ids that end a text.
        stops: Strings that end it; neither they nor what follows is part of the answer. One that is a special token
            counts as an id.
        max_tokens: Its length in tokens at most.

    Attributes:
        text: The text sent so far.
        finish_reason: None while it is generated, then "stop" (end of text, or a stop string) or "length".
        tokens: Tokens used, end of text and stop string included.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, ends: Iterable[int], stops: Sequence[str], max_tokens: int):
        special = {stop for stop in stops if stop in tokenizer.all_special_tokens}
        self.tokenizer, self.max_tokens = tokenizer, max_tokens
        self.ends = frozenset(ends) | set(tokenizer.convert_tokens_to_ids(sorted(special)))
        self.stops = [stop for stop in stops if stop not in special]
        self.ids: list[int] = []
        self.text = ""
        self.finish_reason: str | None = None
        self.tokens = 0

    def feed(self, ids: Iterable[int]) -> str:
        """Add the next final ids; return the new text that can be sent."""
        if self.finish_reason is not None:
            return ""
        for token_id in ids:
            if token_id in self.ends:
                self.finish_reason, self.tokens = "stop", len(self.ids) + 1
                break
            self.ids.append(token_id)
            self.tokens = len(self.ids)
            if len(self.ids) == self.max_tokens:
                self.finish_reason = "length"
                break
        text = self._decode(len(self.ids))
        found = [position for position in map(text.find, self.stops) if position >= 0]
        if found:
            text, self.finish_reason = text[: min(found)], "stop"
            self.tokens = self._tokens_until_stop()
        elif self.finish_reason is None:
            text = text[: self._settled_length(text)]
        new = text[len(self.text) :]
        self.text += new
        return new

    def _decode(self, count: int) -> str:
        return self.tokenizer.decode(self.ids[:count], skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _tokens_until_stop(self) -> int:
        def has_stop(count: int) -> bool:
            text = self._decode(count)
            return any(stop in text for stop in self.stops)

        return bisect.bisect_left(range(len(self.ids) + 1), True, key=has_stop)

    def _settled_length(self, text: str) -> int:
        """Length of the text without an incomplete character or a possible beginning of a stop string at its end."""
        length = len(text.rstrip("\N{REPLACEMENT CHARACTER}"))
        longest = max((len(stop) for stop in self.stops), default=0)
        for held in range(min(longest - 1, length), 0, -1):
            if any(stop.startswith(text[length - held : length]) for stop in self.stops):
                return length - held
        return length
