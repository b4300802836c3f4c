"""HTML pages of the package in a browser: what went wrong in them, what they show, and axe's verdict."""

import re

import pytest


def opened(browser, url, origins, **options):
    """A page of the browser, and a list of what went wrong in it; requests to other origins count.

    `options` are those of a page. It is ready when its body says so, as all of ours do.
    """
    page, problems = browser.new_page(**options), []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda message: problems.append(message.text))
    page.on("request", lambda request: None if request.url.startswith(origins) else problems.append(request.url))
    page.goto(url)
    page.wait_for_selector("body[data-ready]")
    return page, problems


def spans(page, number=0):
    """Text and class of the tokens of one run."""
    return (
        page.locator(".text")
        .nth(number)
        .locator("span")
        .evaluate_all("all => all.map(s => [s.textContent, s.className])")
    )


def check_accessible(page):
    """No violation, and nothing that axe could not judge, in the page as it is; its CSP must be off."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="needs axe-playwright-python").Axe()
    found = axe.run(page)
    assert not found.response["violations"], found.generate_report()
    unsure = [node["html"] for rule in found.response["incomplete"] for node in rule["nodes"]]
    # It cannot judge texts in a plot and single characters; test_colours_have_contrast does.
    unsure = [text for text in unsure if not text.startswith("<text") and not re.search(">.</span>", text)]
    assert not unsure and "color-contrast" in [rule["id"] for rule in found.response["passes"]]
