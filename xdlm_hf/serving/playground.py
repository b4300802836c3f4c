"""The page at / of `xdlm-serve`: two settings side by side, drawn from the drafts of their streams."""

import functools
from pathlib import Path
from string import Template

from ..watch.page import POLICY, RUNS, html_page

BODY, STYLE, SCRIPT = (Path(__file__).with_name(f"playground.{kind}") for kind in ("html", "css", "js"))
CONNECTING = f"{POLICY}; connect-src 'self'; base-uri 'none'; form-action 'none'"
# It is the same for everyone and names no model, so it needs no API key.
HEADERS = {
    "Content-Security-Policy": f"{CONNECTING}; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
}


@functools.cache
def playground() -> str:
    """The page; it talks to the server that it came from, and to no other."""
    body, style, script = (path.read_text(encoding="utf-8") for path in (BODY, STYLE, SCRIPT))
    runs = RUNS.read_text(encoding="utf-8")
    return html_page("Playground", Template(body).substitute(runs=runs), script, style, CONNECTING)
