"""One HTML file with pictures in it, to be opened in any browser or sent by mail."""

import base64
import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem; color: #222; }}
table {{ border-collapse: collapse; font-size: 0.9rem; }}
td {{ padding: 0.1rem 1rem 0.1rem 0; vertical-align: top; overflow-wrap: anywhere; }}
td:first-child {{ color: #666; white-space: nowrap; }}
figure {{ margin: 2.5rem 0; }}
figcaption {{ margin-bottom: 0.5rem; max-width: 45rem; }}
img {{ max-width: 100%; height: auto; image-rendering: pixelated; border: 1px solid #ddd; }}
</style>
</head>
<body>
<h1>{title}</h1>
<table>
{facts}
</table>
{figures}
</body>
</html>
"""


@dataclass(frozen=True)
class Entry:
    """A picture on the sheet."""

    path: Path  # PNG or WebP
    title: str
    text: str


def write(path: Path, title: str, facts: Mapping[str, str], entries: Sequence[Entry]) -> None:
    """Writes the sheet, which holds the pictures themselves and needs no other file.

    Args:
        path: the HTML file.
        title: of the page.
        facts: what the reader should know, by name.
        entries: in order.
    """
    rows = "\n".join(f"<tr><td>{_text(name)}</td><td>{_text(text)}</td></tr>" for name, text in facts.items())
    figures = "\n".join(
        f"<figure><figcaption><strong>{_text(entry.title)}</strong> {_text(entry.text)}</figcaption>"
        f'<img alt="{_text(entry.title)}" src="data:image/{entry.path.suffix[1:]};base64,{_base64(entry.path)}">'
        "</figure>"
        for entry in entries
    )
    path.write_text(_PAGE.format(title=_text(title), facts=rows, figures=figures))


def _text(text: str) -> str:
    return html.escape(text)


def _base64(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()
