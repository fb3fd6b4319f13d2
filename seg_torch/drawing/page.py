"""HTML pages and Markdown from the templates that lie in the folder `templates`."""

import base64
import io
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from PIL import Image

ENVIRONMENT = Environment(
    loader=PackageLoader("seg_torch.drawing"),
    autoescape=select_autoescape(["html"]),
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)


class Figure(NamedTuple):
    """Images side by side over a caption; each is the content of its file, as a `src` of HTML."""

    sources: list[str]
    caption: str


class Plot(NamedTuple):
    """A figure of matplotlib as a `src` of HTML, and its width in pixels."""

    source: str
    width: int


def render(template: str, **values: Any) -> str:
    """Fill in a template of the folder; in HTML, values are escaped."""
    return ENVIRONMENT.get_template(template).render(values)


def figure(images: list[Image.Image], caption: str) -> Figure:
    """Return images, at most 360 pixels wide and high each, for a page."""
    sources = []
    for image in images:
        image.thumbnail((360, 360))
        content = io.BytesIO()
        image.save(content, "JPEG", quality=85, subsampling=0)  # class colours stay sharp
        sources.append(_source("image/jpeg", content))
    return Figure(sources, caption)


def plot(drawing: Any) -> Plot:
    """Return a figure of matplotlib for a page."""
    content = io.BytesIO()
    drawing.savefig(content, format="svg")
    return Plot(_source("image/svg+xml", content), round(96 * drawing.get_figwidth()))


def _source(kind: str, content: io.BytesIO) -> str:
    return f"data:{kind};base64,{base64.b64encode(content.getvalue()).decode()}"
