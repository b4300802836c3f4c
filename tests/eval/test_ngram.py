"""The n-gram judge against its formula, by hand and by a plain recursion."""

import math
from collections import Counter, defaultdict
from pydoc_data.topics import topics

import numpy as np
import pytest

from xdlm_hf.evaluation.ngram import WittenBell


def plain(rows, order, vocab_size):
    """P(w | h) as the formula says it, from dictionaries."""
    after = defaultdict(Counter)
    for row in rows:
        for n in range(order):
            for end in range(n, len(row)):
                after[tuple(row[end - n : end])][row[end]] += 1

    def probability(word, context):
        context = tuple(context)[-(order - 1) :] if order > 1 else ()
        below = probability(word, context[1:]) if context else 1 / vocab_size
        seen = after.get(context)
        if not seen:
            return below
        return (seen[word] + len(seen) * below) / (sum(seen.values()) + len(seen))

    return probability


def test_a_case_by_hand():
    # Text 0 1 0, N = 3. Unigrams: c = 3, T = 2: (2 + 2/3)/5, (1 + 2/3)/5, (2/3)/5 = 8/15, 5/15, 2/15.
    model = WittenBell([[0, 1, 0]], 2, 3)
    assert np.allclose(model.distribution([]), [8 / 15, 5 / 15, 2 / 15], rtol=1e-15)
    # After 0 only 1 was seen, once: half from the count, half from the unigrams.
    assert np.allclose(model.distribution([0]), [4 / 15, 1 / 2 + 5 / 30, 1 / 15], rtol=1e-15)
    # Nothing was seen after 2, and after 0 the last token ends the row.
    assert np.array_equal(model.distribution([2]), model.distribution([]))
    found = model.log_probabilities([[1, 0, 1]])[0]
    assert np.allclose(found, np.log([5 / 15, 1 / 2 + 8 / 30, 2 / 3]), rtol=1e-14) and found.dtype == np.float64


@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_probabilities_are_the_formulas_and_sum_to_one(order):
    generator = np.random.default_rng(order)
    rows = [generator.integers(0, 5, size=generator.integers(1, 12)).tolist() for _ in range(20)]  # 5 and 6 unseen
    model, expected = WittenBell(rows, order, 7), plain(rows, order, 7)
    tested = [generator.integers(0, 7, size=9).tolist() for _ in range(20)] + rows + [[3]]
    for row, found in zip(tested, model.log_probabilities(tested), strict=True):
        by_hand = [math.log(expected(word, row[:at])) for at, word in enumerate(row)]
        assert np.allclose(found, by_hand, rtol=1e-12)
    for context in [[], [6], *(row[:4] for row in tested[:10])]:
        assert abs(model.distribution(context).sum() - 1) < 1e-14


def test_rows_do_not_run_into_each_other():
    apart, joined = WittenBell([[0, 1], [2, 0]], 2, 3), WittenBell([[0, 1, 2, 0]], 2, 3)
    assert apart.distribution([1])[2] < joined.distribution([1])[2]
    both = apart.log_probabilities([[0, 1], [2]])
    assert np.array_equal(both[1], apart.log_probabilities([[2]])[0])


def test_real_text_is_more_probable_than_shuffled_text():
    texts = [topics[name][:4000] for name in sorted(topics)[:60]]
    characters = {character: number for number, character in enumerate(sorted(set("".join(texts))))}
    ids = [np.array([characters[character] for character in text]) for text in texts]
    shuffled = [np.random.default_rng(0).permutation(row) for row in ids[50:]]
    nats = {}
    for order in (1, 2, 5):
        model = WittenBell(ids[:50], order, len(characters))
        for name, rows in (("held out", ids[50:]), ("shuffled", shuffled)):
            nats[name, order] = -np.concatenate(model.log_probabilities(rows)).mean()
    assert nats["held out", 5] < nats["held out", 2] < nats["held out", 1]
    assert nats["shuffled", 5] > nats["shuffled", 1] > nats["held out", 5] + 1
    # Unigrams do not see the order.
    assert abs(nats["shuffled", 1] - nats["held out", 1]) < 1e-12


def test_what_cannot_be_fitted_or_scored_is_refused():
    with pytest.raises(ValueError, match="order=0, the length of the longest n-gram, must be at least 1"):
        WittenBell([[0]], 0, 3)
    with pytest.raises(ValueError, match="text to fit an n-gram model to is empty"):
        WittenBell([], 2, 3)
    with pytest.raises(ValueError, match=r"ids 0 to 3 do not lie in \[0, vocab_size=3\)"):
        WittenBell([[0, 3]], 2, 3)
    with pytest.raises(ValueError, match=r"ids -1 to 0 do not lie"):
        WittenBell([[0, 1]], 2, 3).log_probabilities([[0, -1]])
    assert WittenBell([[0, 1]], 2, 3).log_probabilities([[], [0]])[0].shape == (0,)
