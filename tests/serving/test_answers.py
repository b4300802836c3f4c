"""The text of an answer: what is sure enough to be sent, and what ends it."""

from xdlm_hf.serving.answers import Answer


class Spelled:
    """A tokenizer of single letters, and <e> for the end."""

    all_special_tokens = ["<e>", "<t>"]

    def convert_tokens_to_ids(self, tokens):
        return [{"<e>": 0, "<t>": 1}[token] for token in tokens]

    def decode(self, ids, **_):
        return bytes(ids).decode(errors="replace")


def feed(parts, stops=(), most=100):
    answer = Answer(Spelled(), {0}, stops, most)
    return [answer.feed(part) for part in parts], answer


def test_text_comes_as_soon_as_it_is_sure():
    pieces, answer = feed([b"ab", b"c\xc3", b"\xa9d", b"e\0zz", b"y"])
    assert pieces == ["ab", "c", "éd", "e", ""] and answer.text == "abcéde"
    assert answer.finish_reason == "stop" and answer.tokens == 8


def test_half_a_stop_string_waits_and_a_whole_one_is_never_sent():
    pieces, answer = feed([b"abEN", b"Xc E", b"ND hidden"], stops=("END", "nothing"))
    assert pieces == ["ab", "ENXc ", ""] and answer.finish_reason == "stop"
    assert answer.tokens == len("abENXc END")
    pieces, answer = feed([b"abE"], stops=("END",), most=3)
    assert pieces == ["abE"] and answer.finish_reason == "length"  # nothing follows that could complete it


def test_a_special_token_stops_by_its_id():
    pieces, answer = feed([b"ab\1c"], stops=("<t>",))
    assert pieces == ["ab"] and answer.finish_reason == "stop" and answer.tokens == 3


def test_length_ends_an_answer():
    pieces, answer = feed([b"abcd", b"ef"], most=3)
    assert pieces == ["abc", ""] and answer.finish_reason == "length" and answer.tokens == 3


def test_a_stop_string_within_the_length_wins():
    assert feed([b"aENDb"], stops=("END",), most=4)[1].finish_reason == "stop"
