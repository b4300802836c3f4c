"""HTML pages that show runs step by step: self-contained, with style and scripts inline, so that they work offline."""

import html
from pathlib import Path
from string import Template

FOLDER = Path(__file__).parent
PAGE, RUNS, STYLE, SCRIPT = (FOLDER / name for name in ("page.html", "runs.html", "page.css", "runs.js"))
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"


def html_page(title: str, body: str, script: str, style: str = "", policy: str = POLICY) -> str:
    """A page around runs.

    Args:
        title: Its title and heading, plain text.
        body: HTML of what follows the heading; `RUNS` has the controls and a place for the runs.
        script: JavaScript that follows runs.js, whose variable `runs` it fills.
        style: CSS that follows page.css.
        policy: The Content-Security-Policy; by default the page loads and sends nothing.
    """
    return Template(PAGE.read_text(encoding="utf-8")).substitute(
        title=html.escape(title),
        policy=html.escape(policy, quote=False),
        style=STYLE.read_text(encoding="utf-8") + style,
        body=body,
        script=SCRIPT.read_text(encoding="utf-8") + script,
    )
