"""HTML pages in one file each: they need no network and no other file."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable
from html import escape
from typing import Any

from PIL import Image

from seg_torch.labels import Labels

PAGE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; --soft: #8881; }}
body {{ font: 16px/1.45 system-ui, sans-serif; max-width: 62rem; margin: auto; padding: 1rem; }}
body {{ overflow-wrap: anywhere; }}
h1 {{ font-size: 1.5rem; }} h2 {{ font-size: 1.15rem; margin: 2rem 0 .5rem; }}
pre, .verdict {{ background: var(--soft); padding: .6rem 1rem; white-space: pre-wrap; }}
.verdict {{ border-left: .4rem solid #283; }} .bad {{ border-color: #c33; }}
table {{ border-collapse: collapse; font-size: .9rem; width: 100%; }}
tr {{ border-bottom: 1px solid #8884; }}
th, td {{ text-align: left; vertical-align: top; padding: .3rem .5rem .3rem 0; }}
th, td {{ white-space: pre-line; }}
td + td, th + th {{ text-align: right; overflow-wrap: normal; }}
.key {{ display: inline-flex; gap: .4em; margin-right: .6em; overflow-wrap: break-word; }}
.key i {{ flex: none; width: .9em; height: .9em; margin-top: .25em; border: 1px solid #888; }}
.grid {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(20rem, 1fr)); gap: 1rem; }}
figure {{ margin: 0; display: grid; grid-template-columns: 1fr 1fr; gap: 2px; align-items: start; }}
figure img {{ width: 100%; }}
figcaption {{ grid-column: 1 / 3; font-size: .8rem; }}
.bar {{ display: block; height: .35rem; min-width: 1px; margin-left: auto; background: #48c; }}
td:has(.bar) {{ min-width: 6rem; }}
.scroll {{ overflow-x: auto; }}
</style>
</head>
<body>
<h1>{title}</h1>
{body}
</body>
</html>
"""

# A click on the header of a column sorts its table: the highest first, then the lowest. Cells that
# are no numbers come last.
SORT = """\
<script>
const value = (row, i) => {
  const text = row.cells[i].innerText, number = parseFloat(text.replace(/,/g, ""));
  return isNaN(number) ? text : number;
};
const compare = (a, b, down) => {
  if (typeof a !== typeof b) return typeof a === "number" ? -1 : 1;
  return (typeof a === "number" ? b - a : a.localeCompare(b)) * (down ? 1 : -1);
};
for (const header of document.querySelectorAll("th")) {
  header.style.cursor = "pointer";
  header.tabIndex = 0;
  header.onkeydown = event => event.key === "Enter" && header.click();
  header.onclick = () => {
    const [first, ...rows] = header.closest("table").rows, i = header.cellIndex;
    const down = header.getAttribute("aria-sort") !== "descending";
    for (const other of first.cells) other.removeAttribute("aria-sort");
    header.setAttribute("aria-sort", down ? "descending" : "ascending");
    rows.sort((a, b) => compare(value(a, i), value(b, i), down));
    first.parentNode.append(...rows);
  };
}
</script>
"""


def page(title: str, parts: Iterable[str]) -> str:
    """Return a page of a title, which is escaped, and of parts, which are HTML."""
    return PAGE.format(title=escape(title), body="\n".join(parts))


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Return a table of cells that are HTML; all columns but the first are right-aligned."""
    head = "".join(f"<th>{cell}</th>" for cell in header)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>\n" for row in rows)
    return f'<div class="scroll"><table>\n<tr>{head}</tr>\n{body}</table></div>'


def figure(images: Iterable[Image.Image], caption: str) -> str:
    """Return images side by side, at most 360 pixels wide, over a caption, which is escaped."""
    shown = ""
    for image in images:
        image.thumbnail((360, 360))
        content = io.BytesIO()
        image.save(content, "JPEG", quality=85, subsampling=0)  # class colours stay sharp
        source = base64.b64encode(content.getvalue()).decode()
        shown += f'<img src="data:image/jpeg;base64,{source}" alt="{escape(caption)}">'
    return f"<figure>{shown}<figcaption>{escape(caption)}</figcaption></figure>"


def grid(figures: Iterable[str]) -> str:
    """Return figures side by side, as many as the window holds."""
    return f'<div class="grid">{"".join(figures)}</div>'


def key(labels: Labels, i: int) -> str:
    """Return the colour and name of a class."""
    colour = bytes(labels.palette[i]).hex()
    return f'<span class="key"><i style="background:#{colour}"></i>{escape(labels.names[i])}</span>'


def plot(drawing: Any, name: str) -> str:
    """Return a figure of matplotlib, which scrolls sideways where the window is narrow."""
    content = io.BytesIO()
    drawing.savefig(content, format="svg")
    source = base64.b64encode(content.getvalue()).decode()
    width = f"width:{96 * drawing.get_figwidth():.0f}px"  # its letters are as large as the page's
    image = f'<img src="data:image/svg+xml;base64,{source}" style="{width}" alt="{escape(name)}">'
    return f'<div class="scroll">{image}</div>'
