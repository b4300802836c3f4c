"""The animated picture: its frames, read as XML, and what a browser shows of it at a given time."""

from xml.etree import ElementTree

import pytest
import torch

from xdlm_hf.data.tokenizer import symbol_tokenizer
from xdlm_hf.watch.animation import HOLD, save_animation
from xdlm_hf.watch.tokens import HOLE

MASK, SECONDS = 4, 0.5
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def tokenizer():
    return symbol_tokenizer(["a", "b", "<", " ", "[MASK]"], "a", mask_token="[MASK]")


@pytest.fixture
def runs():
    """A prompt and two letters: one run fills both, the other fills one, changes it, and fills the other."""
    fast = [[0, MASK, MASK], [0, 2, 1]]
    slow = [[0, MASK, MASK], [0, 1, MASK], [0, 2, MASK], [0, 2, 0]]
    return {name: [torch.tensor([state]) for state in states] for name, states in (("fast", fast), ("1 < 2", slow))}


@pytest.fixture
def picture(runs, tokenizer, tmp_path):
    return save_animation(tmp_path / "picture.svg", runs, tokenizer, MASK, start=1, seconds=SECONDS)


def test_each_step_is_a_frame_in_the_colours_of_its_changes(picture):
    root = ElementTree.parse(picture).getroot()
    assert root.find(f"{SVG}title").text == "fast / 1 < 2"
    frames = [
        text for text in root.iter(f"{SVG}text") if "frame" in text.get("class") and "pale" not in text.get("class")
    ]
    shown = [
        (
            frame.get("class"),
            [(span.get("class"), span.text) for span in frame.iter(f"{SVG}tspan") if span.get("class")],
        )
        for frame in frames
    ]
    hole, last = ("pale", HOLE), [("filled", "<"), ("filled", "b")]
    assert shown == [
        ("frame f0", [hole, hole]),
        *((f"frame f{number}", last if number == 1 else []) for number in (1, 2, 3)),
        ("frame f0", [hole, hole]),
        ("frame f1", [("filled", "b"), hole]),
        ("frame f2", [("refined", "<"), hole]),
        ("frame f3", [("filled", "a")]),
    ]


@pytest.mark.parametrize(("time", "frame"), [(0.1, 0), (0.6, 1), (1.4, 2), (1.6, 3), (3.2, 3), (3.6, 0)])
def test_a_browser_shows_one_frame_at_a_time(browser, picture, time, frame):
    assert 3 * SECONDS + HOLD * SECONDS == 3.5  # a round
    page = browser.new_page()
    page.goto(picture.as_uri())
    page.evaluate(f"document.getAnimations().forEach(a => {{ a.pause(); a.currentTime = {1000 * time}; }})")
    assert visible(page) == {f"frame f{frame}", f"frame pale f{frame}"}


def test_without_motion_the_last_step_is_shown(browser, picture):
    page = browser.new_page(reduced_motion="reduce")
    page.goto(picture.as_uri())
    assert visible(page) == {"frame f3", "frame pale f3"}


def visible(page):
    script = "[...document.querySelectorAll('.frame')].filter(e => getComputedStyle(e).visibility == 'visible')"
    return set(page.evaluate(f"{script}.map(e => e.getAttribute('class'))"))


def test_lines_are_folded(runs, tokenizer, tmp_path):
    sizes = []
    for width in (80, 1):
        root = ElementTree.parse(save_animation(tmp_path / "a.svg", runs, tokenizer, MASK, width=width)).getroot()
        sizes.append(float(root.get("height")))
    assert sizes[1] > sizes[0]


@pytest.mark.parametrize("runs", [{}, {"none": [torch.zeros(1, 2, dtype=torch.long)]}])
def test_a_generation_without_a_step_is_refused(runs, tokenizer, tmp_path):
    with pytest.raises(ValueError, match="generations of at least one step, got histories of .* output_history=True"):
        save_animation(tmp_path / "a.svg", runs, tokenizer, MASK)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"row": 1}, r"row=1 must lie between 0 and 0: the histories are \(1, 3\)"),
        ({"start": 3}, "start=3 must lie between 0 and 2"),
        ({"width": 0}, "width=0 letters and seconds=0.8 of a step must be positive"),
        ({"seconds": 0}, "width=80 letters and seconds=0 of a step must be positive"),
    ],
)
def test_what_cannot_be_drawn_is_refused(runs, tokenizer, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        save_animation(tmp_path / "a.svg", runs, tokenizer, MASK, **options)
    assert not list(tmp_path.iterdir())


def test_headings_hold_no_control_characters(runs, tokenizer, tmp_path):
    path = save_animation(tmp_path / "a.svg", {"a\x00<b>": runs["fast"]}, tokenizer, MASK)
    assert ElementTree.parse(path).getroot().find(f"{SVG}title").text == "a\N{MIDDLE DOT}<b>"
