"""The HTML page of a generation, opened in a browser where there is one, and the plot of its counts."""

import base64
import io
import json
import re
import zlib

import numpy as np
import pages
import pytest
import torch
from pages import check_accessible, spans
from PIL import Image

from xdlm_hf.data.tokenizer import train_tokenizer
from xdlm_hf.watch.page import SCRIPT, STYLE
from xdlm_hf.watch.trace import Trace, change_counts, plot_history, save_trace

MASK = 5  # of the tokenizers that train_tokenizer makes


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["a <b>bold</b> & 'quoted' text"], vocab_size=262)  # bytes only: every 漢 is three tokens


def encoded(tokenizer, text):
    return tokenizer(text)["input_ids"]


@pytest.fixture
def history(tokenizer):
    """Two rows of a prompt and eight tokens; the first is filled, refined, re-masked and filled again."""
    first, second = encoded(tokenizer, "p:"), encoded(tokenizer, "q:")
    final = encoded(tokenizer, "<b>漢\n.")
    hole = [MASK] * 8
    rows = [
        [first + hole, second + hole],
        [first + final[:3] + hole[3:], second + hole],
        [first + [final[0], final[4], final[2]] + final[3:], second + final],
        [first + [final[0], MASK, final[2]] + final[3:], second + final],
        [first + final, second + final],
    ]
    return [torch.tensor(state) for state in rows]


def unpacked(page):
    (data,) = re.findall(r'<script id="data" type="text/plain">(.*?)</script>', page, flags=re.DOTALL)
    (run,) = json.loads(zlib.decompress(base64.b64decode(data)))
    return run


def rebuilt(data):
    """The states of every row, by adding up the stored changes."""
    rows = []
    for row in data["rows"]:
        ids, states = list(row["first"]), []
        states.append(list(ids))
        for gaps, values in row["steps"]:
            position = 0
            for gap, value in zip(gaps, values, strict=True):
                position += gap
                ids[position] = value
            states.append(list(ids))
        rows.append(states)
    return torch.tensor(data["ids"])[torch.tensor(rows)].transpose(0, 1)


def test_counts(history):
    counts = change_counts(history, MASK)
    assert counts[0].tolist() == [[3, 0, 0], [5, 1, 0], [0, 0, 1], [1, 0, 0]]
    assert counts[1].tolist() == [[0, 0, 0], [8, 0, 0], [0, 0, 0], [0, 0, 0]]
    assert change_counts(history, None).sum((0, 1)).tolist() == [0, 19, 0]


def test_changes_add_up_to_the_history(tmp_path, tokenizer, history):
    data = unpacked(save_trace(tmp_path / "t.html", history, tokenizer, MASK, start=2).read_text())
    assert rebuilt(data).equal(torch.stack(history))
    assert data["start"] == 2 and data["counts"] == change_counts(history, MASK).tolist()
    # One part of a character is no text: its bytes are stored.
    assert [0xE6] in data["pieces"] and "<" in data["pieces"] and data["pieces"][data["hole"]] == "▁"


def test_nothing_from_outside_and_titles_are_text(tmp_path, tokenizer, history):
    path = tmp_path / "t.html"
    path.write_text("old")
    save_trace(path, history, tokenizer, MASK, title="<script>alert(1)</script>", note='a "b" & $c')
    page = path.read_text()
    assert "<script>alert" not in page and "&lt;script&gt;alert(1)" in page
    assert unpacked(page)["note"] == 'a "b" & $c'  # shown as text, see test_two_runs_side_by_side
    assert "default-src 'none'" in page
    assert not re.findall(r"""(?:src|href)\s*=\s*["'](?!#)|url\(|@import|fetch\(""", page)
    assert [entry.name for entry in tmp_path.iterdir()] == ["t.html"]


def test_a_failed_write_leaves_the_old_page(tmp_path, tokenizer, history, monkeypatch):
    path = tmp_path / "t.html"
    path.write_text("old")
    monkeypatch.setattr("pathlib.Path.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        save_trace(path, history, tokenizer, MASK)
    assert path.read_text() == "old" and [entry.name for entry in tmp_path.iterdir()] == ["t.html"]


@pytest.mark.parametrize("k, most", [(0.1, 200), (1.0, 2500)])
def test_long_generations_give_pages_of_reasonable_size(tmp_path, tokenizer, k, most):
    """256 steps of 8 rows of 1024 tokens: filled once with a tenth refined; and at k = 1, 5 % of all tokens a step."""
    generator = torch.Generator().manual_seed(0)
    order = torch.rand(8, 1024, generator=generator).argsort(-1)
    state = torch.randint(6, 262, (8, 1024), generator=generator) if k == 1 else torch.full((8, 1024), MASK)
    history = [state]
    for step in range(256):
        state = state.clone()
        new = torch.randint(6, 262, (8, 1024), generator=generator)
        filled = order // 4 == step
        changed = torch.rand(8, 1024, generator=generator) < (0.05 if k == 1 else k / 256)
        state = torch.where(filled & (k < 1) | (changed & (state != MASK)), new, state)
        history.append(state)
    size = save_trace(tmp_path / "t.html", history, tokenizer, MASK).stat().st_size
    assert size < most * 1000, f"{size} bytes"


def test_plot_adds_up_to_the_counts(history):
    axes = plot_history(history, MASK)
    counts = change_counts(history, MASK).sum(0)
    for kind, bars in enumerate(axes.containers):
        assert [bar.get_height() for bar in bars] == counts[:, kind].tolist()
    heights = [bar.get_y() + bar.get_height() for bar in axes.containers[-1]]
    assert heights == counts.sum(-1).tolist()
    (second_row, *_) = plot_history(history, MASK, row=1, axes=axes.figure.add_subplot()).containers
    assert [bar.get_height() for bar in second_row] == [0, 8, 0, 0]


def test_refusals(tmp_path, tokenizer, history):
    with pytest.raises(ValueError, match="history of 1 states.*output_history=True"):
        save_trace(tmp_path / "t.html", history[:1], tokenizer, MASK)
    with pytest.raises(ValueError, match=r"one shape \(B, T\), not \[\(2, 9\), \(2, 10\)\]"):
        change_counts([history[0][:, :9].contiguous(), history[0]][::-1], MASK)
    with pytest.raises(ValueError, match="start=11 must lie between 0 and .* 10"):
        save_trace(tmp_path / "t.html", history, tokenizer, MASK, start=11)
    with pytest.raises(ValueError, match="row=2 is not in a batch of 2"):
        plot_history(history, MASK, row=2)
    assert not list(tmp_path.iterdir())


def as_images(ids):
    """A pixel of each token, 2 x 2 tokens in an image; the hole is grey."""
    return torch.where(ids == 9, 128, ids * 20).to(torch.uint8).view(-1, 1, 2, 2)


def image_trace(folder):
    history = [torch.tensor(state) for state in ([[9, 9, 9, 9]], [[1, 9, 9, 9]], [[2, 9, 3, 9]], [[2, 4, 3, 0]])]
    images = {"images": as_images, "grid": (2, 2)}
    return save_trace(folder / "i.html", history, None, 9, **images), history


def test_images_of_every_step_are_in_the_page(tmp_path):
    path, history = image_trace(tmp_path)
    data = unpacked(path.read_text())
    assert data["grid"] == [2, 2] and rebuilt(data)[:, 0].tolist() == [state[0].tolist() for state in history]
    (files,) = data["images"]
    for state, file in zip(history, files, strict=True):
        pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(file))))
        assert pixels.tolist() == as_images(state)[0, 0].tolist()
    assert data["counts"] == [[[1, 0, 0], [1, 1, 0], [2, 0, 0]]]
    for wrong in ({"images": as_images}, {"images": as_images, "grid": (3, 2)}, {"grid": (2, 2)}):
        with pytest.raises(ValueError, match="images need a grid that divides 4 tokens, and no other trace"):
            save_trace(tmp_path / "w.html", history, None, 9, **wrong)


def test_images_in_a_browser(browser, tmp_path):
    path, _ = image_trace(tmp_path)
    page, problems = opened(browser, path)
    page.fill("#slider", "2")
    cells = "all => all.map(s => [s.className, s.style.left, s.style.top])"
    framed = [["refined", "0%", "0%"], ["filled", "0%", "50%"]]
    open_cells = [["open", "50%", "0%"], ["open", "50%", "50%"]]
    assert page.eval_on_selector_all(".picture span", cells) == open_cells + framed
    assert page.inner_text(".legend").split("\n")[-1] == "2 open"
    assert page.get_attribute(".text", "aria-label") == "image after this step"
    assert page.locator("#colours").is_hidden()
    assert page.eval_on_selector(".picture img", "image => image.decode().then(() => image.naturalWidth)") == 2
    assert not problems
    page.close()


def opened(browser, path, **options):
    return pages.opened(browser, path.as_uri(), ("file:", "data:"), **options)


def test_the_page_in_a_browser(browser, tmp_path, tokenizer, history):
    page, problems = opened(browser, save_trace(tmp_path / "t.html", history, tokenizer, MASK, start=2))

    def shown():
        found = spans(page)
        return "".join(text for text, _ in found), [(text, kind) for text, kind in found if kind not in ("", "hole")]

    assert shown() == ("p:<b>漢↵.", [("p", "prompt"), (":", "prompt"), ("b", "filled")])
    page.focus(".text")
    page.keyboard.press("ArrowLeft")
    assert shown()[1][2:] == [("▁", "remasked")] and page.inner_text("#step") == "step 3 of 4"
    page.keyboard.press("ArrowLeft")  # backwards over a re-masked token, and a character that came in three parts
    kinds = [("\ufffd", "refined"), ("漢", "filled"), ("↵", "filled"), (".", "filled")]
    assert shown() == ("p:<\ufffd>漢↵.", [("p", "prompt"), (":", "prompt"), *kinds])
    assert page.inner_text(".legend").split("\n") == ["5 filled", "1 refined", "0 re-masked", "0 ▁ open"]
    assert page.get_attribute("#slider", "aria-valuetext") == "step 2 of 4, 5 filled, 1 refined, 0 re-masked"
    page.keyboard.press("Home")
    assert shown()[0] == "p:" + "▁" * 8
    page.select_option("#row", "1")
    page.fill("#slider", "4")
    assert shown()[0] == "q:<b>漢↵."
    page.fill("#slider", "1")
    assert shown()[0] == "q:" + "▁" * 8
    assert page.locator("svg rect.filled").count() == 1
    page.select_option("#row", "0")
    assert page.locator("svg rect:not(.now)").count() == 5  # 3; 5 and 1; 1; 1
    # The marker is drawn after the bars, so in front of them.
    assert page.locator("svg > *").evaluate_all("all => all.slice(-2).map(s => s.getAttribute('class'))") == [
        "now",
        "pointer",
    ]
    page.click("#play")
    page.wait_for_selector("#step:text-is('step 4 of 4')")
    assert page.inner_text("#play") == "▶ Play" and not problems
    page.close()


def test_keys_move_the_trace_only_while_it_has_the_focus(browser, tmp_path, tokenizer, history):
    page, problems = opened(browser, save_trace(tmp_path / "t.html", history, tokenizer, MASK))
    for target in ("#play", "body"):
        page.focus(target)
        for key in ("ArrowLeft", "Home"):
            page.keyboard.press(key)
        assert page.inner_text("#step") == "step 4 of 4"
    page.focus("#row")
    page.keyboard.press("ArrowDown")  # chooses in the list, and nothing else
    assert page.input_value("#row") == "1" and page.inner_text("#step") == "step 4 of 4"
    page.focus(".text")
    page.keyboard.press("Control+ArrowLeft")
    assert page.inner_text("#step") == "step 4 of 4"
    page.keyboard.press("Home")
    assert page.inner_text("#step") == "step 0 of 4" and not problems
    page.close()


def confidences_of(history):
    """Every token written in step i has the confidence i / 8."""
    states = [torch.full(history[0].shape, torch.nan)]
    for step, (before, after) in enumerate(zip(history, history[1:], strict=False), 1):
        states.append(torch.where(before != after, step / 8, states[-1]).masked_fill(after == MASK, torch.nan))
    return states


def test_confidences_are_in_the_page(tokenizer, history):
    data = unpacked(Trace(history, tokenizer, MASK, confidences=confidences_of(history)).page())
    # Its last steps re-mask a token, which then has none, and fill it again.
    assert [step[2] for step in data["rows"][0]["steps"]] == [[12] * 3, [25] * 6, [-1], [50]] and data["confident"]
    plain = unpacked(Trace(history, tokenizer, MASK, confidences=[]).page())
    assert not plain["confident"] and all(len(step) == 2 for step in plain["rows"][0]["steps"])
    with pytest.raises(ValueError, match=r"confidences of 4 states \(2, 10\) do not fit a history of 5 states"):
        Trace(history, tokenizer, MASK, confidences=confidences_of(history)[1:])


def test_colours_by_order_and_confidence(browser, tmp_path, tokenizer, history):
    path = save_trace(tmp_path / "t.html", history, tokenizer, MASK, 2, confidences=confidences_of(history))
    page, problems = opened(browser, path)

    def shares():
        return page.locator(".text span").evaluate_all("all => all.map(s => s.style.background.match(/[0-9.]+%/)?.[0])")

    # "<" and ">" come in step 1, "b" in step 4, the other three characters in step 2; the prompt has no colour.
    assert shares() == [None] * 8
    page.select_option("#colour", "order")
    assert shares() == [None, None, "25%", "100%", "25%", "50%", "50%", "50%"]
    assert page.inner_text(".ramp").split() == ["step", "1", "step", "4"]
    page.select_option("#colour", "confidence")
    assert shares() == [None, None, "12%", "50%", "12%", "25%", "25%", "25%"]
    assert page.locator(".text span").nth(3).get_attribute("title") == (
        f"position 3, token {int(history[4][0, 3])}, since step 4, confidence 50 %"
    )
    page.fill("#slider", "3")  # the hole and the tokens to come have none
    assert shares() == [None, None, "12%", None, "12%", "25%", "25%", "25%"] and not problems
    page.close()
    page, _ = opened(browser, save_trace(tmp_path / "u.html", history, tokenizer, MASK, 2))
    assert page.locator("#colour option[value=confidence]").is_disabled()
    page.close()


def test_two_runs_side_by_side(browser, tmp_path, tokenizer, history):
    short = Trace(history[:3], tokenizer, MASK, 2, title="short", note="<i>first</i>")
    path = short.save(tmp_path / "t.html", beside=Trace(history, tokenizer, MASK, 2, title="long"))
    page, problems = opened(browser, path, viewport={"width": 1280, "height": 800})
    assert page.inner_text("h1") == page.title() == "short and long"
    assert page.locator("h2").all_inner_texts() == ["short", "long"]
    assert page.locator("section .note").first.inner_text() == "<i>first</i>"
    assert page.inner_text("#step") == "step 4 of 4"
    left, right = ("".join(text for text, _ in spans(page, number)) for number in (0, 1))
    assert left == "p:<\ufffd>漢↵." and right == "p:<b>漢↵."
    assert "done after step 2" in page.locator(".legend").nth(0).inner_text()
    page.locator(".text").nth(1).focus()
    page.keyboard.press("Home")
    page.keyboard.press("ArrowRight")
    assert spans(page, 0) == spans(page, 1)
    boxes = [page.locator("section").nth(number).bounding_box() for number in (0, 1)]
    assert boxes[0]["y"] == boxes[1]["y"] and boxes[0]["x"] + boxes[0]["width"] <= boxes[1]["x"]
    page.set_viewport_size({"width": 390, "height": 800})
    boxes = [page.locator("section").nth(number).bounding_box() for number in (0, 1)]
    assert boxes[0]["x"] == boxes[1]["x"] and boxes[0]["y"] + boxes[0]["height"] <= boxes[1]["y"]
    assert page.evaluate("document.documentElement.scrollWidth") == 390 and not problems
    page.close()
    with pytest.raises(ValueError, match="2 rows do not fit 1 rows beside them"):
        short.page(beside=Trace([state[:1] for state in history], tokenizer, MASK))


def test_right_to_left_tokens_keep_their_places(browser, tmp_path):
    words = {1: "abc ", 2: "\u05d0\u05d1 ", 3: "\u05d2\u05d3", 4: "! ", 9: ""}

    class Words:
        @staticmethod
        def decode(ids):
            return "".join(words[token_id] for token_id in ids)

    final = torch.tensor([[1, 2, 3, 4], [4, 2, 3, 1]])  # the second row begins with a Hebrew letter
    history = [torch.full_like(final, 9), torch.where(final == 3, 9, final), final]
    page, problems = opened(browser, save_trace(tmp_path / "t.html", history, Words, 9))
    for row, direction in enumerate(("ltr", "rtl")):
        page.select_option("#row", str(row))
        for step in range(3):
            page.fill("#slider", str(step))
            assert page.get_attribute(".text", "dir") == direction
            lefts = page.locator(".text span").evaluate_all("all => all.map(s => s.getBoundingClientRect().left)")
            assert lefts == sorted(lefts, reverse=direction == "rtl") and len(lefts) == 4
    assert not problems
    page.close()


def test_a_notebook_shows_the_page_in_a_frame(browser, tmp_path, tokenizer, history):
    trace = Trace(history, tokenizer, MASK, 2, title='a "b" & <c>')
    page = browser.new_page()
    page.set_content("<input>" + trace._repr_html_() + Trace(history[:3], tokenizer, MASK, 2)._repr_html_())
    first, second = (page.frame_locator("iframe").nth(number) for number in (0, 1))
    assert first.locator("#step").inner_text() == "step 4 of 4" and first.locator("h1").inner_text() == trace.title
    assert second.locator("#step").inner_text() == "step 2 of 2"
    page.focus("input")
    page.keyboard.press("Home")
    assert first.locator("#step").inner_text() == "step 4 of 4"
    page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_no_violation(browser, tmp_path, scheme):
    class Words:  # of more than one letter: axe does not judge single ones
        @staticmethod
        def decode(ids):
            return "".join(f"word{token_id} " for token_id in ids)

    states = [[[1, 2, MASK, MASK]], [[1, 2, 7, 8]], [[1, 2, 9, 8]], [[1, 2, MASK, 8]], [[1, 2, 6, 8]]]
    history = [torch.tensor(state) for state in states]
    trace = Trace(history, Words, MASK, 2, title="one", confidences=confidences_of(history))
    path = trace.save(tmp_path / "t.html", beside=Trace(history[::-1], Words, MASK, 2, title="two"))
    page, problems = opened(browser, path, color_scheme=scheme, bypass_csp=True)  # axe is a script from outside
    for colour, step in (("change", 2), ("change", 3), ("order", 4), ("confidence", 4)):
        page.select_option("#colour", colour)
        page.fill("#slider", str(step))
        check_accessible(page)
    assert not problems
    page.close()


def test_colours_have_contrast():
    """What axe does not judge, plots and holes, and both ends of the scales: WCAG 1.4.3 and 1.4.11."""

    def luminance(colour):
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    def contrast(one, other):
        low, high = sorted((luminance(one), luminance(other)))
        return (high + 0.05) / (low + 0.05)

    light, dark = (dict(re.findall(r"--([\w-]+): (#\w{6})", part)) for part in STYLE.read_text().split("@media")[:2])
    assert light.keys() == dark.keys() and len(light) == 21
    for scheme in (light, dark):
        for name in ("filled-bar", "refined-bar", "remasked-bar", "edge", "accent", "ink"):
            assert contrast(scheme[name], scheme["card"]) >= 3, name
        for name in ("hole", "pale"):
            assert contrast(scheme[name], scheme["card"]) >= 4.5, name
        for back in ("order-first", "order-last", "confidence-first", "confidence-last"):
            assert contrast(scheme["ink"], scheme[back]) >= 4.5, back
    assert "</script" not in SCRIPT.read_text()
