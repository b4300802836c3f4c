"""The page at / of xdlm-serve, in a browser where there is one."""

import re
import threading
import urllib.request

import pytest
import torch
from pages import check_accessible, opened, spans
from servers import NAME, Server, held, wait_until

from xdlm_hf.serving.app import ServerSettings
from xdlm_hf.serving.playground import SCRIPT, playground
from xdlm_hf.serving.requests import Defaults, Limits

FAILED = "Failed to load resource"  # what the browser's console says of a refused request


@pytest.fixture
def page(browser, server):
    page, problems = opened(browser, server.url, server.url)
    yield page
    page.close()
    assert not problems


def settings(page, number, **values):
    for name, value in values.items():
        field = page.locator("fieldset").nth(number).locator(f"[name={name}]")
        field.select_option(value) if name in ("sampler", "policy") else field.fill(str(value))


def generate(page, prompt="The quick", tokens=16, wait=True):
    page.fill("#prompt", prompt)
    page.fill("#tokens", str(tokens))
    page.click("#generate")
    if wait:
        page.wait_for_selector("#generate:not([disabled])")


def text(page, number=0):
    return "".join(piece for piece, _ in spans(page, number))


def ids_of(page, number):
    """Ids of a run's answer after the step shown."""
    return page.evaluate(
        "i => runs[i].go(Math.min(step, runs[i].steps)).ids"
        ".slice(runs[i].data.start, runs[i].data.end).map(id => runs[i].data.ids[id])",
        number,
    )


def answer(model, tokenizer, prompt, **options):
    ids = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    options = {"max_new_tokens": 16, "block_length": 8, "return_dict_in_generate": True} | options
    output = model.generate(**ids, output_history=True, **options)
    return [state[0, ids["input_ids"].shape[1] :].tolist() for state in output.history]


def test_the_page_is_whole_and_names_nothing(model, tokenizer):
    server = Server(model, tokenizer, ServerSettings("secret-model", api_key="secret-key"))
    try:
        with urllib.request.urlopen(server.url + "/") as reply:
            page, headers = reply.read().decode(), reply.headers
    finally:
        server.stop()
    assert page == playground() and not re.search("secret", page)
    assert "default-src 'none'" in headers["content-security-policy"]
    assert "connect-src 'self'" in headers["content-security-policy"]
    assert "frame-ancestors 'none'" in headers["content-security-policy"]
    assert not re.findall(r"""(?:src|href)\s*=\s*["'](?!#)|url\(|@import""", page)
    assert set(re.findall(r"https?://[^\s\"'<]+", page)) == {"http://www.w3.org/2000/svg"}
    assert not re.search(r"localStorage|sessionStorage|document\.cookie|innerHTML", page)
    assert "</script" not in SCRIPT.read_text()


def test_two_settings_are_drawn_while_they_are_computed(page, model, tokenizer):
    passes, allowed = iter(range(10**6)), threading.Event()
    settings(page, 0, steps=8, mixing_ratio=0)
    settings(page, 1, steps=4, mixing_ratio=0.6)
    first = answer(model, tokenizer, "The quick", steps=8, mixing_ratio=0.0)
    second = answer(model, tokenizer, "The quick", steps=4, mixing_ratio=0.6)
    with held(model, lambda: allowed.is_set() or next(passes) < 3):  # 3 of the 8 steps
        generate(page, wait=False)
        wait_until(lambda: page.inner_text("#step") == "step 3 of 8")
        assert ids_of(page, 0) == first[3] and "▁" in text(page)
        assert page.locator("section .note").all_inner_texts() == ["generating", "waiting"]
        assert page.inner_text("#status") == "Generating." and page.evaluate("document.activeElement.id") == "stop"
        page.fill("#slider", "1")  # whoever looks at a step is left there
        assert ids_of(page, 0) == first[1]
        allowed.set()
        page.wait_for_selector("#generate:not([disabled])")
    assert page.inner_text("#step") == "step 1 of 8" and ids_of(page, 0) == first[1]
    assert page.inner_text("#status") == "Done. The slider shows every step."
    assert page.locator("h2").all_inner_texts() == ["A: 8 steps, k = 0", "B: 4 steps, k = 0.6"]
    for step in (8, 3, 0, 5):
        page.fill("#slider", str(step))
        assert ids_of(page, 0) == first[step] and (step == 0 or ids_of(page, 1) == second[min(step, 4)])
    assert "done after step 4" in page.locator(".legend").nth(1).inner_text()
    page.focus("#slider")
    page.keyboard.press("ArrowLeft")
    assert page.inner_text("#step") == "step 4 of 8"
    page.focus("#generate")
    page.keyboard.press("ArrowLeft")
    assert page.inner_text("#step") == "step 4 of 8"
    counts = page.locator("section").nth(1).locator("svg rect.refined").count()
    assert counts == sum(
        any(a != b and a != 5 for a, b in zip(x, y, strict=True)) for x, y in zip(second, second[1:], strict=False)
    )
    for note, steps in zip(page.locator("section .note").all_inner_texts(), (8, 4), strict=True):
        assert re.fullmatch(rf"\d+ tokens in {steps} steps, \d+\.\d\d s(, ended by itself)?", note)


def test_drafts_that_were_left_out_and_characters_of_many_tokens(page):
    """A slow page misses drafts: what it draws follows from what it got."""
    cells = [
        [{"id": 5, "text": "▁", "mask": True}, {"id": 7, "text": "\ufffd", "bytes": [0xC3]}],
        [{"id": 8, "text": "a\n\u202e"}, {"id": 7, "text": "\ufffd", "bytes": [0xC3]}],
        [{"id": 7, "text": "\ufffd", "bytes": [0xC3]}, {"id": 9, "text": "\ufffd", "bytes": [0xA9]}],
    ]
    page.evaluate(
        """([one, two, three]) => {
          const data = blank("t", "p\\nq", "s", 2, 5);
          const state = {known: new Map(), cells: Array(2).fill(data.hole)};
          get("results").hidden = false;
          runs = [new Run(data, true)];
          for (const [step, cells] of [[1, one], [4, two], [5, three]]) add(data, {step, steps: 5, cells}, state);
          choose(0);
          show(Infinity);
        }""",
        cells,
    )
    assert text(page) == "p↵qés" and page.inner_text("#step") == "step 5 of 5"
    assert [kind for _, kind in spans(page)] == ["prompt", "prompt", "refined", "prompt"]
    page.fill("#slider", "3")
    assert text(page) == "p↵q▁\ufffds" and page.inner_text(".legend").split("\n")[0] == "0 filled"
    page.fill("#slider", "4")
    assert text(page) == "p↵qa↵·\ufffds"
    assert page.evaluate("runs[0].data.counts[0]") == [[1, 0, 0], [0, 0, 0], [0, 0, 0], [1, 0, 0], [0, 2, 0]]


def test_a_gap_is_filled(page, model, tokenizer):
    page.uncheck("#compare")
    assert page.locator("fieldset").nth(1).is_hidden()
    page.fill("#suffix", " dog")
    settings(page, 0, steps=8, mixing_ratio=0.5)
    generate(page, "The", 8)
    before, after = tokenizer("The")["input_ids"], tokenizer(" dog", add_special_tokens=False)["input_ids"]
    whole = torch.tensor([before + [0] * 8 + after])
    expected = model.generate(whole, holes=[(len(before), len(before) + 8)], steps=8, mixing_ratio=0.5)
    assert ids_of(page, 0) == expected[0, len(before) : len(before) + 8].tolist()
    shown = spans(page)
    assert shown[0] == ["The", "prompt"] and shown[-1] == [" dog", "prompt"]
    assert page.locator("section").count() == 1 and "tokens in 8 steps" in page.inner_text("section .note")


def test_chats_and_samplers(page, server):
    before = server.engine.metrics.requests.labels("/v1/chat/completions", 200)._value.get()
    page.check("#chat")
    settings(page, 0, steps=4, sampler="ancestral", temperature=1)
    settings(page, 1, steps=4, policy="threshold", threshold=0.01)
    page.fill("#seed", "3")
    generate(page, "Who?", 8)
    assert server.engine.metrics.requests.labels("/v1/chat/completions", 200)._value.get() == before + 2
    titles = page.locator("h2").all_inner_texts()
    assert titles == ["A: 4 steps, k = 0, temperature 1, ancestral", "B: 4 steps, k = 0.1, edits from 0.01"]
    assert page.evaluate("runs.map(run => run.steps)") == [4, 4] and page.inner_text("#problems") == ""


def test_errors_are_shown_and_the_next_run_works(browser, server):
    page, problems = opened(browser, server.url, server.url)
    settings(page, 0, steps=17)
    settings(page, 1, steps=4)
    generate(page)
    assert page.inner_text("#problems") == (
        "A: steps=17 is more than max_new_tokens=16: every step fills at least one token; use steps=16."
    )
    assert page.locator("section .note").nth(0).inner_text() == "ended after step 0"
    assert page.evaluate("runs.map(run => run.steps)") == [0, 4] and page.get_attribute("#problems", "role") == "alert"
    settings(page, 0, steps=8)
    generate(page)
    assert page.inner_text("#problems") == "" and page.evaluate("runs.map(run => run.steps)") == [8, 4]
    assert [FAILED in problem for problem in problems] == [True]
    page.close()


def test_stop_ends_the_request(page, server, model):
    cancelled, allowed, passes = server.metric("xdlm_cancelled_total"), threading.Event(), iter(range(10**6))
    settings(page, 0, steps=16)
    with held(model, lambda: allowed.is_set() or next(passes) < 2):
        generate(page, wait=False)
        wait_until(lambda: page.evaluate("runs[0]?.steps") == 2)
        page.click("#stop")
        wait_until(lambda: server.metric("xdlm_cancelled_total") == cancelled + 1)
        allowed.set()
    page.wait_for_selector("#generate:not([disabled])")
    assert page.inner_text("#status") == "Stopped."
    assert page.locator("section .note").all_inner_texts() == ["ended after step 2", "not started"]


def test_the_key_is_asked_for_and_kept_in_memory(browser, model, tokenizer):
    server = Server(model, tokenizer, ServerSettings(NAME, Limits(), Defaults(block_length=8), api_key="secret"))
    try:
        page, problems = opened(browser, server.url, server.url)
        assert page.is_visible("#access") and page.is_disabled("#generate")
        assert page.evaluate("document.activeElement.id") == "key" and page.inner_text("#refused") == ""
        page.fill("#key", "wrong")
        page.keyboard.press("Enter")
        wait_until(lambda: "a valid API key is needed" in page.inner_text("#refused"))
        box = page.locator("#refused").bounding_box()
        assert box["y"] + box["height"] < page.locator("#form").bounding_box()["y"]
        page.fill("#key", "secret")
        page.click("#access button")
        page.wait_for_selector("#access", state="hidden")
        assert f"Model {NAME}, at most 256 tokens" in page.inner_text("#note") and page.inner_text("#problems") == ""
        generate(page)
        assert "tokens in 16 steps" in page.locator("section .note").nth(1).inner_text()
        assert page.evaluate("[localStorage.length, sessionStorage.length, document.cookie, location.href]") == [
            0,
            0,
            "",
            server.url + "/",
        ]
        assert all(FAILED in problem for problem in problems)
        page.reload()
        page.wait_for_selector("body[data-ready]")
        assert page.is_visible("#access")
        page.close()
    finally:
        server.stop()


def test_a_generation_is_announced_once(page):
    """A screen reader hears that it began and ended, not every step."""
    page.evaluate(
        """() => {
          window.heard = [];
          const live = '[aria-live]:not([aria-live=off]), [role=status], [role=alert], output:not([aria-live=off])';
          for (const node of document.querySelectorAll(live)) {
            new MutationObserver(() => heard.push(node.textContent)).observe(
              node, {childList: true, subtree: true, characterData: true});
          }
        }"""
    )
    generate(page)
    assert [said for said in page.evaluate("heard") if said] == ["Generating.", "Done. The slider shows every step."]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_no_violation_in_the_playground(browser, server, model, scheme):
    page, problems = opened(browser, server.url, server.url, color_scheme=scheme, bypass_csp=True)
    check_accessible(page)
    settings(page, 0, steps=17)
    generate(page)
    for colour, width in (("change", 1280), ("confidence", 390)):
        page.set_viewport_size({"width": width, "height": 800})
        page.select_option("#colour", colour)
        page.evaluate("get('access').hidden = false")
        assert page.is_visible("#access") and page.inner_text("#problems")
        check_accessible(page)
        assert page.evaluate("document.documentElement.scrollWidth") == width
    left, right = (page.locator("section").nth(number).bounding_box() for number in (0, 1))
    assert left["x"] == right["x"] and left["y"] < right["y"]
    assert all(FAILED in problem for problem in problems)
    page.close()
