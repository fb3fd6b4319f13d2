"""What README and docs say: their links, their commands, their code, the notebook and the site."""

import json
import os
import re
import shlex
import subprocess
import sys
import warnings
from html.parser import HTMLParser
from pathlib import Path

import make_data
import pytest
from conftest import ROOT

from seg_torch import cli

PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md"]
PAGES += sorted((ROOT / "docs").rglob("*.md"))
NOTEBOOK = ROOT / "docs/quickstart.ipynb"


FENCE = re.DOTALL | re.MULTILINE


def blocks(text: str, language: str = "") -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, FENCE)


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


# Commands


def commands() -> list[tuple[str, str]]:
    """Every command line of ours in README, docs and notebook that has settings, with its page."""
    names = "|".join(p.stem for p in cli.CONFIG_FOLDER.glob("*.yaml") if p.stem not in cli.INTERNAL)
    ours = rf"\s*(?:%run )?(?:python |(?:python )?-m seg_torch |seg-torch )({names})(?:\.py)?( .*=.*)"
    found = set()
    for path in [*PAGES, NOTEBOOK]:
        text = path.read_text(encoding="utf-8")
        if path == NOTEBOOK:
            lines = [line for cell in json.loads(text)["cells"] for line in cell["source"]]
        else:
            text = text.replace("\\\n", " ")
            lines = [line for block in blocks(text) for line in block.splitlines()]
            lines += re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=FENCE))
        for line in lines:
            if match := re.fullmatch(ours, line.rstrip()):
                found.add((path.name, match[1] + match[2]))
    return sorted(found)


@pytest.mark.parametrize(("page", "line"), commands())
def test_every_command_of_the_texts_has_settings_that_exist(page, line, compose):
    name, *arguments = shlex.split(line, comments=True)
    # The folders of an example are nowhere: those of a run would be read, others are composed.
    settings = [a for a in arguments if "=" in a and not a.startswith("resume=")]
    swept = "-m" in arguments
    # Each value that a sweep lists; an interval stands for any.
    values = [[s] if not swept else one_by_one(s) for s in settings if "=interval(" not in s]
    for number in range(max(map(len, values), default=0)):
        compose(name, *(choices[number % len(choices)] for choices in values))


def one_by_one(setting: str) -> list[str]:
    key, _, value = setting.partition("=")
    return [setting] if value[:1] == "[" else [f"{key}={v}" for v in value.split(",")]


# Links


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    text = re.sub(r"^```.*?^```", "", text, flags=FENCE)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    plain = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {heading.strip().replace(" ", "-") for heading in plain}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_to_a_file_or_heading_leads_there(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]*`", "", text)):
        if target.startswith(("http://", "https://")):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), target
        if anchor:
            assert anchor in anchors(file.read_text(encoding="utf-8")), target
