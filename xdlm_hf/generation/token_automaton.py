"""An automaton over the tokens of a tokenizer, and its best or a drawn path under the distributions of all positions.

The language is that of a `ByteAutomaton`, then end-of-text tokens up to the end of the canvas. Tokens with the same
moves in all states form a class, and moves between the same two states by the same classes share a set, so that the
cost of a path depends on classes and sets, not on the vocabulary.

Shapes: B batch, L columns of the answer, N vocabulary, S states (the last: after the end of the text), C classes of
tokens, E moves (pairs of states), W sets of classes.
"""

import json
from collections.abc import Collection, Sequence
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from .automaton import ByteAutomaton

_STARTS = 64  # start states whose moves are followed at a time, to bound the memory
_WORST = -1e9  # score of a token of probability 0: taken only if every path has one


class Vocabulary:
    """The bytes of a tokenizer's tokens, as a trie of their prefixes.

    Args:
        tokens: Bytes of each token by id; None for special tokens, which are no text.
    """

    def __init__(self, tokens: Sequence[bytes | None]):
        self.tokens = tokens
        text = torch.frombuffer(
            bytearray(b"".join(token or b"" for token in tokens) or b"\0"), dtype=torch.uint8
        ).long()
        lengths = torch.tensor([len(token or b"") for token in tokens])
        offsets = lengths.cumsum(0) - lengths
        self.nodes = torch.zeros_like(lengths)  # node of each token; 0 is the empty prefix
        self.levels: list[tuple[int, Tensor, Tensor]] = []  # by length of prefix: first node, parents, bytes
        self.num_nodes = 1
        for length in range(int(lengths.max()) if len(lengths) else 0):
            longer = (lengths > length).nonzero().squeeze(-1)
            keys, inverse = (self.nodes[longer] * 256 + text[offsets[longer] + length]).unique(return_inverse=True)
            self.levels.append((self.num_nodes, keys // 256, keys % 256))
            self.nodes[longer] = self.num_nodes + inverse
            self.num_nodes += len(keys)

    @staticmethod
    def of(tokenizer: PreTrainedTokenizerBase) -> "Vocabulary":
        """The vocabulary of a tokenizer, computed once.

        Raises:
            ValueError: If its tokens are not bytes that are joined to a text.
        """
        if tokenizer not in _VOCABULARIES:
            _VOCABULARIES[tokenizer] = Vocabulary(_token_bytes(tokenizer))
        return _VOCABULARIES[tokenizer]


_VOCABULARIES: "WeakKeyDictionary[PreTrainedTokenizerBase, Vocabulary]" = WeakKeyDictionary()


def _token_bytes(tokenizer: PreTrainedTokenizerBase) -> list[bytes | None]:
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"json_schema needs the model's fast tokenizer, not {type(tokenizer).__name__}; pass tokenizer=tokenizer."
        )
    decoder = tokenizer.backend_tokenizer.decoder
    state = {} if decoder is None else json.loads(decoder.__getstate__())
    kinds = {part["type"] for part in state.get("decoders", [state]) if "type" in part}
    if "ByteLevel" in kinds:
        byte_of = {character: byte for byte, character in bytes_to_unicode().items()}

        def spelled(token: str) -> bytes | None:
            return bytes(byte_of[c] for c in token) if all(c in byte_of for c in token) else None
    elif "ByteFallback" in kinds:

        def spelled(token: str) -> bytes | None:
            is_byte = len(token) == 6 and token.startswith("<0x") and token.endswith(">")
            return bytes([int(token[3:5], 16)]) if is_byte else token.replace("\u2581", " ").encode()
    else:
        raise ValueError(
            f"json_schema needs a byte-level tokenizer or one with byte fallback; this one joins its tokens by "
            f"{sorted(kinds) or 'no decoder'}."
        )
    vocabulary = tokenizer.get_vocab()
    tokens: list[bytes | None] = [None] * (max(vocabulary.values()) + 1)
    for token, token_id in vocabulary.items():
        tokens[token_id] = spelled(token)
    for token_id, added in tokenizer.added_tokens_decoder.items():
        tokens[token_id] = None if added.special else added.content.encode()
    for token_id in tokenizer.all_special_ids:
        tokens[token_id] = None
    return tokens


class TokenAutomaton:
    """The automaton of a language over tokens.

    Args:
        language: The text before the end.
        vocabulary: The tokens.
        size: N, rows of the output layer; those beyond the vocabulary are never taken.
        ends: Ids that end the text.
        padding: Ids that may follow the end, beside `ends`.
        excluded: Ids that are never taken.

    Raises:
        ValueError: If no sequence of tokens spells a text of the language.
    """

    def __init__(
        self,
        language: ByteAutomaton,
        vocabulary: Vocabulary,
        size: int,
        ends: Collection[int],
        padding: Collection[int] = (),
        excluded: Collection[int] = (),
    ):
        num = len(language.accepts)
        self.num_states, self.end = num + 1, num
        text = torch.zeros(size, dtype=torch.bool)
        nodes = vocabulary.nodes[:size]
        text[: len(nodes)] = nodes > 0
        text[[*ends, *padding, *excluded]] = False
        ids = text.nonzero().squeeze(-1)
        step = torch.cat([language.step, torch.full((1, 256), -1)])
        step = torch.where(step < 0, num, step)  # state `num` stands for no move until the end is added
        self.class_of, members = _classes(step, vocabulary, nodes, ids, size)
        moves = _walk(step, [vocabulary.tokens[i] for i in members.tolist()])  # (C, S - 1)
        c, s = (moves < num).nonzero().unbind(-1)
        t = moves[c, s]
        # The end: from accepting states by `ends`, from itself by `padding` too.
        accepting = language.accepts.nonzero().squeeze(-1)
        after = torch.tensor([num])
        for tokens, sources in ((ends, torch.cat([accepting, after])), (set(padding) - set(ends), after)):
            tokens = sorted(set(tokens) - set(excluded))
            if tokens:
                self.class_of[tokens] = len(members)
                c = torch.cat([c, torch.full_like(sources, len(members))])
                s, t = torch.cat([s, sources]), torch.cat([t, torch.full_like(sources, num)])
                members = torch.cat([members, torch.tensor(tokens[:1])])
        self.num_classes = len(members)
        self.final = torch.cat([language.accepts, torch.tensor([True])])
        self._set_moves(c, s, t)
        self._order()

    def _set_moves(self, c: Tensor, s: Tensor, t: Tensor) -> None:
        """The moves on some path from the start to the end, and the shortest path."""
        pairs, inverse = (s * self.num_states + t).unique(return_inverse=True)
        source, target = pairs // self.num_states, pairs % self.num_states
        unreached = torch.iinfo(torch.int64).max // 2
        to_end = torch.where(self.final, 0, unreached)
        from_start = torch.full_like(to_end, unreached)
        from_start[0] = 0
        to_end, from_start = _distances(to_end, target, source), _distances(from_start, source, target)
        if to_end[0] >= unreached:
            raise ValueError("the tokenizer has no tokens that spell an answer by json_schema.")
        self.shortest = int(to_end[0])  # in tokens
        kept = (to_end[target] < unreached) & (from_start[source] < unreached)
        number = kept.cumsum(0) - 1
        self.source, self.target = source[kept], target[kept]
        c, inverse = c[kept[inverse]], number[inverse[kept[inverse]]]
        # Sets of classes are compared by a sum of random numbers; two agree by chance with a probability below 1e-17.
        generator = torch.Generator().manual_seed(0)
        key = torch.randint(-(2**62), 2**62, (self.num_classes,), generator=generator)
        sums = torch.zeros(len(self.source), dtype=torch.long).index_add_(0, inverse, key[c])
        sets, self.set_of = sums.unique(return_inverse=True)
        first = torch.empty(len(sets), dtype=torch.long).scatter_(0, self.set_of, torch.arange(len(self.set_of)))
        chosen = first[self.set_of[inverse]] == inverse
        self.members = torch.zeros(len(sets), self.num_classes, dtype=torch.bool)  # (W, C)
        self.members[self.set_of[inverse[chosen]], c[chosen]] = True

    def _order(self) -> None:
        """Tokens sorted by class, those that are alone in their class first."""
        ids = (self.class_of >= 0).nonzero().squeeze(-1)
        counts = torch.bincount(self.class_of[ids], minlength=self.num_classes)
        place = torch.argsort(counts, stable=True)  # classes by size
        rank = torch.empty_like(place).scatter_(0, place, torch.arange(len(place)))
        self.class_of[ids] = rank[self.class_of[ids]]
        self.members = self.members[:, place]
        self.order = ids[torch.argsort(self.class_of[ids], stable=True)]
        counts = counts[place]
        self.singles, self.sizes = int((counts == 1).sum()), counts[counts > 1].tolist()

    def to(self, device: torch.device) -> "TokenAutomaton":
        """Moves the tables; returns itself."""
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(self, name, value.to(device))
        return self

    def class_scores(self, scores: Tensor, draws: bool = False) -> Tensor:
        """(M, C): maxima of token scores (M, N) over each class, or with `draws` the log of the sum of exponentials."""
        sorted_ = scores.index_select(-1, self.order).nan_to_num_(nan=_WORST).clamp_min_(_WORST)
        parts = [sorted_[:, : self.singles]]
        for part in sorted_[:, self.singles :].split(self.sizes, -1) if self.sizes else ():
            parts.append(part.logsumexp(-1, keepdim=True) if draws else part.amax(-1, keepdim=True))
        return torch.cat(parts, -1)

    def path(self, scores: Tensor, u: Tensor | None = None) -> Tensor:
        """Classes (B, L) of the path of highest score, or of one drawn with probability proportional to exp(score).

        A path's score is the sum of its classes' scores. Computed in float64 by messages from the last column to the
        first, then a walk from the start: max-product (Viterbi), or with `u` sum-product (forward filtering, backward
        sampling, with the two directions exchanged).

        Args:
            scores: (B, L, C); -inf for a class that must not be taken.
            u: (B, L, 2) float64 in [0, 1), quantiles of the draws; None for the best path.

        Returns:
            (B, L) int64. Arbitrary if no path is possible.
        """
        scores = scores.double()
        batch, length = scores.shape[:2]
        moves = self._reduce_sets(scores, u is not None)[..., self.set_of]  # (B, L, E), with the best that can follow
        message = torch.where(self.final, 0.0, -torch.inf).double().expand(batch, -1)
        for p in range(length - 1, -1, -1):
            ahead = moves[:, p].add_(message[:, self.target])
            if p:
                message = _reduce(ahead, self.source, self.num_states, u is not None)
        state = torch.zeros(batch, 1, dtype=torch.long, device=scores.device)
        chosen = []
        for p in range(length):
            possible = moves[:, p].masked_fill(self.source != state, -torch.inf)
            move = _choose(possible, None if u is None else u[:, p, :1])
            chosen.append(self.set_of[move])
            state = self.target[move]
        inside = scores.masked_fill(~self.members[torch.cat(chosen, 1)], -torch.inf)
        return _choose(inside, None if u is None else u[..., 1:]).squeeze(-1)

    def _reduce_sets(self, scores: Tensor, draws: bool) -> Tensor:
        """(B, L, W): the scores of the sets, from those of their classes."""
        w, c = self.members.nonzero().unbind(-1)
        flat = _reduce(scores.flatten(0, 1)[:, c], w, len(self.members), draws)
        return flat.unflatten(0, scores.shape[:2])


def _classes(step: Tensor, vocabulary: Vocabulary, nodes: Tensor, ids: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Class of each token (N,), -1 without any move, and one token of each class.

    Tokens are compared by a random linear function of their moves modulo 2^64; two classes agree by chance with a
    probability below 1e-17, and any two of 1e5 below 1e-7.
    """
    num = len(step) - 1
    generator = torch.Generator().manual_seed(0)
    factor = torch.randint(-(2**62), 2**62, (num,), generator=generator) * 2 + 1
    value = torch.randint(-(2**62), 2**62, (num,), generator=generator)
    sums = torch.zeros(vocabulary.num_nodes, dtype=torch.long)
    for starts in torch.arange(num).split(_STARTS):
        start, state, first_node = starts, starts, 0  # moves from `starts` that are possible so far, sorted by node
        counts = torch.tensor([len(starts)])  # of each node of the level
        for first, parents, byte in vocabulary.levels:
            begin = (counts.cumsum(0) - counts)[parents - first_node]
            counts = counts[parents - first_node]
            child = torch.repeat_interleave(counts)
            before = begin[child] + torch.arange(len(child)) - (counts.cumsum(0) - counts)[child]
            following = step[state[before], byte[child]]
            possible = (following < num).nonzero().squeeze(-1)
            child, state, start = child[possible], following[possible], start[before[possible]]
            sums.index_add_(0, first + child, factor[start] * value[state])
            counts, first_node = torch.bincount(child, minlength=len(parents)), first
            if not len(child):
                break
    sums = sums[nodes[ids]]
    ids, sums = ids[sums != 0], sums[sums != 0]
    found, inverse = sums.unique(return_inverse=True)
    class_of = torch.full((size,), -1)
    class_of[ids] = inverse
    return class_of, torch.empty(len(found), dtype=torch.long).scatter_(0, inverse, ids)


def _walk(step: Tensor, tokens: Sequence[bytes | None]) -> Tensor:
    """(C, S - 1) states after each token from each state."""
    num = len(step) - 1
    state = torch.arange(num).repeat(len(tokens), 1)
    flat, lengths = step.flatten(), torch.tensor([len(token) for token in tokens])
    padded = torch.zeros(len(tokens), int(lengths.max()) if len(tokens) else 0, dtype=torch.long)
    for i, token in enumerate(tokens):
        padded[i, : len(token)] = torch.tensor(list(token))
    for j in range(padded.shape[1]):
        rows = (lengths > j).nonzero().squeeze(-1)
        state[rows] = flat[state[rows] * 256 + padded[rows, j : j + 1]]
    return state


def _distances(start: Tensor, source: Tensor, target: Tensor) -> Tensor:
    """Fewest moves to each state from those at distance 0."""
    while True:
        better = start.scatter_reduce(0, target, start[source] + 1, "amin")
        if torch.equal(better, start):
            return start
        start = better


def _reduce(scores: Tensor, group: Tensor, num_groups: int, sums: bool) -> Tensor:
    """Maximum, or log of the sum of exponentials, of scores (M, E) over the groups (E,); -inf for an empty group."""
    index = group.expand(len(scores), -1)
    best = scores.new_full((len(scores), num_groups), -torch.inf).scatter_reduce_(1, index, scores, "amax")
    if not sums:
        return best
    shift = best.nan_to_num(neginf=0.0)
    return torch.zeros_like(best).scatter_add_(1, index, (scores - shift[:, group]).exp()).log() + shift


def _choose(scores: Tensor, u: Tensor | None) -> Tensor:
    """Index of the largest score, the first of equals, or at quantile `u` (..., 1) of softmax(scores); (..., 1)."""
    top = scores.amax(-1, keepdim=True)
    if u is None:
        return (scores == top).to(torch.uint8).argmax(-1, keepdim=True)
    cumulative = (scores - top.nan_to_num(neginf=0.0)).exp().cumsum(-1)
    target = torch.minimum(u * cumulative[..., -1:], torch.nextafter(cumulative[..., -1:], torch.zeros_like(u)))
    return torch.searchsorted(cumulative, target, right=True).clamp_max(scores.shape[-1] - 1)
