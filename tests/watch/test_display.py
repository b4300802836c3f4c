"""What the terminal view says happened in a step."""

import pytest
import torch
from rich.console import Console

from xdlm_hf.data.tokenizer import train_tokenizer
from xdlm_hf.watch.display import history_table, step_text
from xdlm_hf.watch.tokens import TokenPieces, token_bytes, token_changes, visible, without_controls

MASK = 0


class Letters:
    def decode(self, ids):
        return "".join("?abcdefgh\n"[i] for i in ids)


BEFORE, AFTER = torch.tensor([1, 0, 2, 3, 0]), torch.tensor([1, 2, 4, 0, 0])


def test_changes_are_told_apart():
    changes = token_changes(BEFORE, AFTER, MASK)
    assert changes.filled.tolist() == [False, True, False, False, False]
    assert changes.refined.tolist() == [False, False, True, False, False]
    assert changes.remasked.tolist() == [False, False, False, True, False]


def test_without_a_mask_token_every_change_is_a_refinement():
    changes = token_changes(BEFORE, AFTER, None)
    assert changes.refined.tolist() == [False, True, True, True, False]
    assert not changes.filled.any() and not changes.remasked.any()


def test_step_text_colours_the_changes():
    text = step_text(BEFORE, AFTER, Letters(), MASK)
    assert text.plain == "abd▁▁"
    styles = [(text.plain[span.start : span.end], str(span.style)) for span in text.spans]
    assert styles == [("b", "bold green"), ("d", "bold blue"), ("▁", "bold red"), ("▁", "dim")]
    assert step_text(torch.tensor([9]), torch.tensor([9]), Letters(), MASK).plain == "↵"


def test_parts_of_characters_are_put_together():
    tokenizer = train_tokenizer(["plain text"], vocab_size=262)  # bytes only
    ids = tokenizer("a漢é")["input_ids"]
    pieces = TokenPieces(tokenizer, tokenizer.mask_token_id)
    assert [pieces[n] for n in ids] == ["a", b"\xe6", b"\xbc", b"\xa2", b"\xc3", b"\xa9"]
    assert list(pieces.units(ids)) == [(0, 1, "a"), (1, 4, "漢"), (4, 6, "é")]
    # A hole, another character or the end inside a character: what is left of it cannot be read.
    broken = [*ids[1:3], tokenizer.mask_token_id, ids[2], ids[0], ids[1]]
    assert "".join(text for _, _, text in pieces.units(broken)) == "\ufffd\ufffd▁\ufffda\ufffd"
    holes = torch.full((6,), tokenizer.mask_token_id)
    text = step_text(holes, torch.tensor(ids), tokenizer, tokenizer.mask_token_id)
    assert text.plain == "a漢é" and {str(span.style) for span in text.spans} == {"bold green"}


def test_bytes_of_tokens():
    assert token_bytes("<0xE6>") == b"\xe6" and token_bytes("Ġæ") == b" \xe6" and token_bytes("Ċ") == b"\n"
    assert token_bytes("漢") is None and token_bytes("") is None


def test_nothing_that_a_terminal_obeys_is_shown():
    assert visible("a\x1b[2Jb\r\n\tc") == "a·[2Jb·↵⇥c"
    assert without_controls("a\x1b]0;x\x07\n\tb\x9b") == "a·]0;x·\n\tb·"


def test_table_adds_up_what_happens_between_the_steps_shown():
    history = [torch.tensor([[1, 0, 0, 0, 0]]), torch.tensor([[1, 2, 0, 0, 0]]), torch.tensor([[1, 3, 4, 0, 0]])]
    history += [torch.tensor([[1, 3, 4, 5, 0]]), torch.tensor([[1, 3, 4, 6, 7]])]
    console = Console(width=80, record=True, color_system=None, force_terminal=False)
    console.print(history_table(history, Letters(), MASK, start=1, every=2))
    lines = [line.replace("│", " ").split() for line in console.export_text().splitlines() if "│" in line]
    assert lines[0] == ["2", "2", "0", "0", "cd▁▁"]
    assert lines[1] == ["4", "2", "0", "0", "cdfg"]


@pytest.mark.parametrize(
    "history, every, message",
    [([torch.zeros(1, 2)], 1, "history of 1 states.*output_history=True"), ([torch.zeros(1, 2)] * 2, 0, "every=0")],
)
def test_refusals(history, every, message):
    with pytest.raises(ValueError, match=message):
        history_table(history, Letters(), MASK, every=every)
