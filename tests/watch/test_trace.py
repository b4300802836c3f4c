"""The HTML page of a generation, opened in a browser where there is one, and the plot of its counts."""

import base64
import io
import json
import re
import shutil
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from xdlm_hf.data.tokenizer import train_tokenizer
from xdlm_hf.watch.trace import change_counts, plot_history, save_trace

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
    return json.loads(zlib.decompress(base64.b64decode(data)))


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
    assert "<script>alert" not in page and "&lt;script&gt;alert(1)" in page and "a &quot;b&quot; &amp; $c" in page
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
    page, problems = browser.new_page(), []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda message: problems.append(message.text))
    page.goto(path.as_uri())
    page.wait_for_selector("body[data-ready]")
    page.fill("#slider", "2")
    cells = "all => all.map(s => [s.className, s.style.left, s.style.top])"
    framed, open_cells = (
        [["refined", "0%", "0%"], ["filled", "0%", "50%"]],
        [["open", "50%", "0%"], ["open", "50%", "50%"]],
    )
    assert page.eval_on_selector_all(".picture span", cells) == open_cells + framed
    assert page.inner_text("#legend").split("\n")[-1] == "2 open"
    assert page.get_attribute("#text", "aria-label") == "image after this step"
    assert page.eval_on_selector(".picture img", "image => image.decode().then(() => image.naturalWidth)") == 2
    assert not problems
    page.close()


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="opening the page needs playwright")
    program = shutil.which("chromium") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("opening the page needs chromium or google-chrome on the path")
    with playwright.sync_playwright() as session:
        running = session.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield running
        running.close()


def test_the_page_in_a_browser(browser, tmp_path, tokenizer, history):
    path = save_trace(tmp_path / "t.html", history, tokenizer, MASK, start=2)
    page = browser.new_page()
    problems = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda message: problems.append(message.text))
    page.on("request", lambda request: None if request.url.startswith("file:") else problems.append(request.url))
    page.goto(path.as_uri())
    page.wait_for_selector("body[data-ready]")

    def shown():
        spans = page.eval_on_selector_all("#text span", "all => all.map(s => [s.textContent, s.className])")
        return "".join(text for text, _ in spans), [(text, kind) for text, kind in spans if kind not in ("", "hole")]

    assert shown() == ("p:<b>漢↵.", [("p", "prompt"), (":", "prompt"), ("b", "filled")])
    page.keyboard.press("ArrowLeft")
    assert shown()[1][2:] == [("▁", "remasked")] and page.inner_text("#step") == "step 3 of 4"
    page.keyboard.press("ArrowLeft")  # backwards over a re-masked token, and a character that came in three parts
    kinds = [("\ufffd", "refined"), ("漢", "filled"), ("↵", "filled"), (".", "filled")]
    assert shown() == ("p:<\ufffd>漢↵.", [("p", "prompt"), (":", "prompt"), *kinds])
    assert page.inner_text("#legend").split("\n") == ["5 filled", "1 refined", "0 re-masked", "0 ▁ open"]
    page.keyboard.press("Home")
    assert shown()[0] == "p:" + "▁" * 8
    page.keyboard.press("ArrowDown")
    page.keyboard.press("End")
    assert shown()[0] == "q:<b>漢↵." and page.input_value("#row") == "1"
    page.fill("#slider", "1")
    assert shown()[0] == "q:" + "▁" * 8
    assert page.locator("#plot rect.filled").count() == 1
    page.select_option("#row", "0")
    assert page.locator("#plot rect:not(.now)").count() == 5  # 3; 5 and 1; 1; 1
    page.click("#play")
    page.wait_for_selector("#step:text-is('step 4 of 4')")
    assert page.get_attribute("#play", "aria-pressed") == "false"
    assert not problems
    page.close()
