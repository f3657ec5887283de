"""The frame of the pages: one file that loads nothing, with their common style sheet.

A policy in the page forbids browsers everything but its own style sheet, its own script and images inside
the file. Style sheet and script are allowed by their digests: markup in a text of data cannot add another.
"""

import base64
import hashlib
from collections.abc import Iterable
from html import escape


def html_page(title: str, sections: Iterable[str], more_style: str = "", script: str = "") -> str:
    """Return a page.

    Args:
        title: plain text.
        sections: HTML; empty ones are omitted.
        more_style: style sheet after the common one.
        script: of the page, without which it is complete. None by default.
    """
    style = _STYLE + more_style
    page = _FRAME.format(
        style_digest=_digest(style),
        script_policy=f"script-src {_digest(script)}; " if script else "",
        title=escape(title),
        style=style,
        body="\n".join(filter(None, sections)),
        script=f"<script>{script}</script>\n" if script else "",
    )
    # A lone surrogate in a path cannot be encoded.
    return page.encode("utf-8", "replace").decode("utf-8")


def html_bytes(html: str) -> int:
    """Return the number of bytes that a part needs in a page."""
    return len(html.encode("utf-8", "replace"))


def _digest(text: str) -> str:
    """Return a source of the page's policy that allows `text` only."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode('ascii')}'"


_FRAME = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src {style_digest}; \
{script_policy}img-src data:; base-uri 'none'; form-action 'none'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="referrer" content="no-referrer">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
{body}
</main>
{script}</body>
</html>
"""

_STYLE = """
:root { color-scheme: light dark; --line: #d9dde3; --quiet: #6b7280; --tile: #f5f7fa; --mark: #ffe9a8; }
@media (prefers-color-scheme: dark) {
  :root { --line: #3a4150; --quiet: #9aa3b2; --tile: #1f2430; --mark: #6b5310; }
}
body { margin: 0; font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 24px; }
header { display: flex; align-items: center; gap: 14px; flex-wrap: wrap; }
h1 { font-size: 26px; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 17px; margin: 32px 0 8px; }
h3 { font-size: 15px; margin: 20px 0 6px; }
a { color: inherit; }
code { font-size: 13px; overflow-wrap: anywhere; }
.mark { background: var(--mark); border-radius: 3px; padding: 0 3px; unicode-bidi: isolate; }
.mark { font: 11px ui-monospace, monospace; }
.badge { padding: 2px 12px; border-radius: 99px; color: #fff; background: #6b7280; font-size: 14px; }
.badge.completed { background: #1a7f5a; }
.badge.preempted { background: #b45f06; }
.badge.diverged, .badge.error { background: #b3264a; }
.badge.warning { background: #a85b06; }
.badge.note { background: #4b6a9b; }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(190px, 1fr)); gap: 12px; }
.tiles { margin: 20px 0; }
.tiles div { background: var(--tile); border-radius: 8px; padding: 12px 14px; }
.tiles b { display: block; font-size: 24px; line-height: 1.3; }
.tiles span, .tiles small { display: block; color: var(--quiet); font-size: 13px; }
img { width: 100%; border: 1px solid var(--line); border-radius: 8px; background: #fff; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
section, details, .wide { overflow-x: auto; }
.wide th { width: auto; white-space: nowrap; }
th, td { text-align: left; vertical-align: top; padding: 5px 16px 5px 0; }
th, td { border-bottom: 1px solid var(--line); overflow-wrap: anywhere; }
th { font-weight: 500; color: var(--quiet); width: 240px; }
.phases { width: auto; }
.phases td { text-align: right; }
.phases meter { width: 320px; }
.numbers th, .numbers td { text-align: right; width: auto; }
.explained { color: var(--quiet); font-size: 13px; margin: 6px 0; }
details { margin-top: 32px; }
summary { cursor: pointer; font-weight: 600; }
"""
