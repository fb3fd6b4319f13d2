"""What README and docs say: their links, their commands, their code, the notebook and the site."""

import inspect
import json
import os
import pkgutil
import re
import shlex
import subprocess
import sys
import warnings
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import make_data
import nbformat
import pytest
from conftest import ROOT, run_command
from jupyter_client import KernelManager
from nbclient import NotebookClient
from PIL import Image

import seg_torch
from seg_torch import datasets, losses, metrics, models
from seg_torch.files import CONFIG_FOLDER

NOT_IN_DOCS = ["CHANGELOG.md", "CONTRIBUTING.md"]
PAGES = [ROOT / name for name in ("README.md", *NOT_IN_DOCS)]
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
    names = "|".join(p.stem for p in CONFIG_FOLDER.glob("*.yaml"))
    programs = r"\s*(?:%run )?(?:python |(?:python )?-m seg_torch |seg-torch )"
    ours = rf"{programs}({names})(?:\.py)?( .*=.*)"
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


def make_labelme_examples(folder: Path) -> None:
    """The layout of labelme's own repository: three images, each with its JSON beside it."""
    for i, name in enumerate(("2011_000003", "2011_000006", "2011_000025")):
        image = folder / f"labelme/examples/semantic_segmentation/data_annotated/{name}.jpg"
        make_data.save(make_data.picture(i), image)
        shapes = [make_data.labelme_shape("person", make_data.polygon(i, 0), "polygon")]
        make_data.write_labelme(image.with_suffix(".json"), shapes, image.name)


EXPORTS = {
    "labelme": make_labelme_examples,
    "cvat": lambda folder: make_data.make_cvat(folder / "cvat"),
    "coco": lambda folder: make_data.make_coco(folder / "coco"),
}


@pytest.mark.parametrize("name", EXPORTS)
def test_two_commands_lead_from_an_export_to_overlays(name, tmp_path):
    """Those of the docs, with a small network from random weights and one epoch."""
    section = (ROOT / "docs/datasets.md").read_text("utf-8").split("## From an annotation tool")[1]
    (pair,) = (block for block in blocks(section) if f"output_dir=runs/{name}\n" in block)
    train, predict = (line.removeprefix("python ") for line in pair.splitlines())
    EXPORTS[name](tmp_path)
    small = "model.encoder=test_efficientnet model.weights=null data.augment.crop=[32,32]"
    small += " data.num_workers=0 trainer.max_epochs=1 trainer.accelerator=cpu logger=none"
    assert run_command(f"{train.replace('train.py', 'train')} {small}", tmp_path) == 0
    assert run_command(predict.replace("predict.py", "predict"), tmp_path) == 0
    root = re.search(r"input=(\S+)", predict)[1]
    images = {path.stem for path in (tmp_path / root).rglob("*.jpg")}
    assert images == {path.stem for path in (tmp_path / "overlays/overlay").rglob("*.jpg")}
    masks = list((tmp_path / "overlays/mask").rglob("*.png"))
    assert len(masks) == len(images) >= 2


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


def test_no_page_is_left_out_of_the_site():
    listed = re.findall(r"^ +- .*: (\S+\.md)$", (ROOT / "mkdocs.yml").read_text("utf-8"), re.M)
    pages = [path.relative_to(ROOT / "docs").as_posix() for path in PAGES[3:]]
    assert sorted(listed) == sorted(["index.md", "quickstart.md", *NOT_IN_DOCS, *pages])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_module_and_source_file_of_the_texts_exists(page):
    if page.name == "CHANGELOG.md":  # which names old ones, too
        return
    text = re.sub(r"\S*\btoy\b\S*", "", page.read_text(encoding="utf-8"))  # to be written
    for name in re.findall(r"\bseg_torch(?:\.[A-Za-z]\w*)+", text):
        pkgutil.resolve_name(name)
    for name in re.findall(r"(?<![\w/])(?:benchmarks|conf|seg_torch|tests)/[\w/]+\.\w+", text):
        assert (ROOT / name).is_file(), name


# Code


def test_the_ten_lines_of_python_train_and_predict(tmp_path, monkeypatch):
    """As in the README, but for a smaller network without a download and one epoch."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (code,) = (block for block in blocks(readme, "python") if "Trainer(" in block)
    assert len([line for line in code.splitlines() if line]) <= 10
    for text, smaller in (
        ('encoder="resnet34"', 'encoder="test_efficientnet", weights=None'),
        ("resize=(256, 256)", "resize=(32, 32)"),
        ("max_epochs=20", "max_epochs=1, accelerator='cpu', enable_progress_bar=False"),
    ):
        assert text in code
        code = code.replace(text, smaller)
    monkeypatch.chdir(tmp_path)
    make_data.make_folder(tmp_path / "photos")
    make_data.picture(1).save("photo.jpg")
    names: dict[str, Any] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's advice
        exec(code, names)
    task = names["task"]
    assert task.trainer.global_step == 1
    assert 0 <= task.trainer.callback_metrics["val/mean_iou"] <= 1
    assert task.inference.num_classes == 3
    mask = Image.open("out/mask/image.png")
    assert mask.size == (make_data.WIDTH, make_data.HEIGHT)
    assert Path("out/overlay/image.jpg").is_file()


def test_the_notebook_runs_without_a_network_and_is_stored_without_outputs(tmp_path):
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in code)
    offline = "import socket; socket.socket.connect = None"  # any connection is a TypeError
    notebook.cells.insert(0, nbformat.v4.new_code_cell(offline))
    manager = KernelManager(kernel_name="python3")
    settings = {**environment(), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    client = NotebookClient(
        notebook, km=manager, timeout=300, resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute(env=settings)
    printed = [
        output.get("text", "") + output.get("data", {}).get("text/plain", "")
        for cell in code
        for output in cell.outputs
    ]
    text = "".join(printed)
    assert re.search(r"mean IoU 0\.\d+", text)
    assert (tmp_path / "quickstart/checkpoints/best.onnx").is_file()
    same = float(re.search(r"([\d.]+) of the pixels are the same", text)[1])
    assert same > 0.99  # the Segmenter's network is in bfloat16 where that is fast


# The site


class Page(HTMLParser):
    """The anchors of a page, what it links to, and what it loads."""

    def __init__(self) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.loaded: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = dict(attributes)
        self.anchors.add(values.get("id") or "")
        if tag == "a" and values.get("href"):
            self.links.append(str(values["href"]))
        elif tag in ("script", "img", "iframe") and values.get("src"):
            self.loaded.append(str(values["src"]))
        elif tag == "link" and values.get("rel") != "canonical":
            self.loaded.append(str(values["href"]))


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    build = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", folder]
    done = subprocess.run(
        build, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_the_site_is_whole_and_loads_nothing_from_elsewhere(site):
    pages = {path: Page() for path in site.rglob("*.html")}
    for path, page in pages.items():
        page.feed(path.read_text(encoding="utf-8"))
    assert {"index.html", "quickstart.html", "CONTRIBUTING.html"} <= {p.name for p in pages}
    for path, page in pages.items():
        if path.name == "404.html":  # whose links are absolute
            continue
        for link in page.loaded:
            assert not re.match(r"(\w+:)?//", link), f"{path.name} loads {link}"
        for link in [*page.links, *page.loaded]:
            if re.match(r"\w+:", link):
                continue
            name, _, anchor = link.partition("#")
            target = (path.parent / name.partition("?")[0]).resolve() if name else path
            assert target.exists(), f"{path.name}: {link}"
            if anchor:
                assert anchor in pages[target].anchors, f"{path.name}: {link}"
    styles = "".join(p.read_text(encoding="utf-8") for p in site.rglob("*.css"))
    assert not re.search(r"(url\(|@import)\s*[\"']?(https?:)?//", styles)


def test_the_reference_documents_all_that_is_imported_from_a_package(site):
    documented = set()
    for page in (site / "api").glob("*.html"):
        documented |= set(re.findall(r'id="(seg_torch\.[\w.]+)"', page.read_text("utf-8")))
    for name in ("segmenter.Segmenter.load", "segmentation.Segmentation.overlay"):
        assert f"seg_torch.prediction.{name}" in documented
    assert "seg_torch.evaluation.scorer.score" in documented
    names = {id.rpartition(".")[2] for id in documented}
    for package in (seg_torch, datasets, losses, metrics, models):
        public = getattr(package, "__all__", vars(package))
        if package is metrics:  # which imports its names when they are first used
            public = [name for names in metrics.MODULES.values() for name in names]
        for name in public:
            if inspect.isroutine(part := getattr(package, name)) or inspect.isclass(part):
                assert name in names, f"{package.__name__}.{name}"
    page = (site / "api/losses.html").read_text(encoding="utf-8")
    assert "ignored" in page


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 200


def test_every_choice_of_the_configuration_is_in_the_docs():
    choices = re.findall(r"^\| `(\w+)=` \| (.*) \|$", (ROOT / "docs/training.md").read_text(), re.M)
    named = {group: set(re.findall(r"`([\w]+)`", text)) for group, text in choices}
    for group in ("model", "loss", "optimizer", "scheduler", "logger"):
        names = {path.stem for path in (CONFIG_FOLDER / group).glob("*.yaml")}
        assert names - {"hub"} <= named[group], group  # whose models are not trained
    page = (ROOT / "docs/datasets.md").read_text(encoding="utf-8")
    for path in (CONFIG_FOLDER / "data").glob("*.yaml"):
        if path.stem not in ("default", "from_checkpoint"):
            assert re.search(rf"^\| [^|]*`{path.stem}`[^|]*\|", page, re.M), path.stem
