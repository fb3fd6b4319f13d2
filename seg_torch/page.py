"""HTML pages in one file each: they need no network, no script and no other file."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable
from html import escape

from PIL import Image

PAGE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; --line: #8884; --soft: #8881; --bad: #c33; --good: #283; }}
body {{ font: 16px/1.45 system-ui, sans-serif; max-width: 62rem; margin: auto; padding: 1rem; }}
body {{ overflow-wrap: anywhere; }}
h1 {{ font-size: 1.5rem; }} h2 {{ font-size: 1.15rem; margin: 2rem 0 .5rem; }}
.verdict {{ border-left: .4rem solid var(--good); background: var(--soft); padding: .6rem 1rem; }}
.bad {{ border-color: var(--bad); }}
.wide {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-size: .9rem; width: 100%; }}
th, td {{ text-align: left; vertical-align: top; padding: .3rem .5rem .3rem 0; }}
tr {{ border-bottom: 1px solid var(--line); }}
td {{ white-space: pre-line; }}
td + td, th + th {{ text-align: right; overflow-wrap: normal; font-variant-numeric: tabular-nums; }}
.key {{ display: inline-flex; gap: .4em; margin-right: .6em; overflow-wrap: break-word; }}
.key i {{ flex: none; width: .9em; height: .9em; margin-top: .25em; border: 1px solid #888; }}
.grid {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(20rem, 1fr)); gap: 1rem; }}
figure {{ margin: 0; display: grid; grid-template-columns: 1fr 1fr; gap: 2px; align-items: start; }}
figure img {{ width: 100%; display: block; }}
figcaption {{ grid-column: 1 / 3; font-size: .8rem; opacity: .8; }}
pre {{ background: var(--soft); padding: .6rem; white-space: pre-wrap; }}
</style>
</head>
<body>
<h1>{title}</h1>
{body}
</body>
</html>
"""


def page(title: str, parts: Iterable[str]) -> str:
    """Return a page of a title, which is escaped, and of parts, which are HTML."""
    return PAGE.format(title=escape(title), body="\n".join(parts))


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Return a table of cells that are HTML; all columns but the first are right-aligned."""
    head = "".join(f"<th>{cell}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>\n" for row in rows)
    return f'<div class="wide"><table>\n<tr>{head}</tr>\n{body}</table></div>'


def figure(images: Iterable[Image.Image], caption: str) -> str:
    """Return images side by side, as JPEG in the page itself, over a caption, which is escaped."""
    sources = []
    for image in images:
        content = io.BytesIO()
        image.save(content, "JPEG", quality=85, subsampling=0)  # class colours stay sharp
        sources.append(f"data:image/jpeg;base64,{base64.b64encode(content.getvalue()).decode()}")
    shown = "".join(f'<img src="{source}" alt="{escape(caption)}">' for source in sources)
    return f"<figure>{shown}<figcaption>{escape(caption)}</figcaption></figure>"
