"""What mkdocs.yml builds beside the files of docs/: those above it, and the notebook as a page."""

import json
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
ABOVE = {
    "README.md": "index.md",
    "CHANGELOG.md": "CHANGELOG.md",
    "CONTRIBUTING.md": "CONTRIBUTING.md",
}


def on_files(files: Files, config: Any) -> Files:
    for name, page in ABOVE.items():
        files.append(File.generated(config, page, content=(ROOT / name).read_text("utf-8")))
    notebook = json.loads((ROOT / "docs/quickstart.ipynb").read_text("utf-8"))
    files.append(File.generated(config, "quickstart.md", content=as_markdown(notebook)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Return a page with the links that GitHub follows as the site has them."""
    markdown = re.sub(r"\]\(docs/", "](", markdown)
    for name, target in ABOVE.items():
        markdown = re.sub(rf"\]\((\.\./)?{re.escape(name)}(?=[#)])", f"]({target}", markdown)
    return markdown


def as_markdown(notebook: dict[str, Any]) -> str:
    """Return the cells of a notebook: text as it is, code in fences."""
    parts = []
    for cell in notebook["cells"]:
        text = "".join(cell["source"])
        parts.append(text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```")
    return "\n\n".join(parts)
