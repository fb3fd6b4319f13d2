"""The package: what it declares, what the wheel holds, and that it works without the sources."""

import ast
import os
import re
import subprocess
import sys
import zipfile
from importlib.metadata import packages_distributions
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
# Imported by others for us: Lightning's TensorBoardLogger.
INDIRECT = {"tensorboard"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--wheel-dir", folder, ROOT], check=True)
    return next(folder.glob("*.whl"))


def imported() -> set[str]:
    """The third-party distributions that the package imports, anywhere in its files."""
    modules = set()
    for path in (ROOT / "seg_torch").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                modules |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                modules.add(str(node.module))
    top = {module.split(".")[0] for module in modules} - {*sys.stdlib_module_names, "seg_torch"}
    names = packages_distributions()
    return {normal(names.get(module, [module])[0]) for module in top}


def normal(name: str) -> str:
    return name.lower().replace("_", "-")


def pyproject() -> dict[str, Any]:
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def declared() -> tuple[set[str], set[str]]:
    """Of pyproject.toml: what is always installed, and the extras'."""
    project = pyproject()["project"]
    extras = project["optional-dependencies"]
    optional = [r for name in extras if name not in ("dev", "bench") for r in extras[name]]
    both = project["dependencies"], optional
    return tuple({normal(Requirement(r).name) for r in group} for group in both)


@pytest.mark.promise(24)
def test_d32_what_is_imported_is_declared_and_the_reverse():
    always, optional = declared()
    assert imported() <= always | optional
    assert always - INDIRECT <= imported()


def test_d32_the_wheel_holds_every_configuration_and_works_without_the_sources(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    packed = tmp_path / "site/seg_torch/conf"
    files = {path.relative_to(ROOT / "conf") for path in (ROOT / "conf").rglob("*.yaml")}
    assert files == {path.relative_to(packed) for path in packed.rglob("*.yaml")}
    assert (tmp_path / "site/seg_torch/py.typed").is_file()
    classes = {path.name for path in (ROOT / "seg_torch/datasets/classes").iterdir()}
    assert classes == {p.name for p in (tmp_path / "site/seg_torch/datasets/classes").iterdir()}
    templates = {path.name for path in (ROOT / "seg_torch/drawing/templates").iterdir()}
    assert templates == {p.name for p in (tmp_path / "site/seg_torch/drawing/templates").iterdir()}
    (tmp_path / "empty").mkdir()

    def run(*line: str) -> str:
        return subprocess.run(
            [sys.executable, *line],
            cwd=tmp_path / "empty",
            env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
            check=True,
            capture_output=True,
            text=True,
        ).stdout

    where = run("-c", "from seg_torch.files import CONFIG_FOLDER; print(CONFIG_FOLDER)")
    assert where.strip() == str(packed)
    assert "data.dataset.train=600" in run("-m", "seg_torch", "train", "--help")
    version = run("-m", "seg_torch", "--version").strip()
    assert wheel.name.split("-")[1] == version
    entry = next((tmp_path / "site").glob("*.dist-info")) / "entry_points.txt"
    assert "seg-torch = seg_torch.cli.main:main" in entry.read_text()


@pytest.mark.promise(24)
def test_every_requirement_is_a_published_package_with_a_lower_bound_and_no_upper_one():
    """`make test-lowest` runs with the lower bounds; an upper one keeps others from upgrading."""
    content = pyproject()
    project = content["project"]
    extras = project["optional-dependencies"]
    always = [*content["build-system"]["requires"], *project["dependencies"]]
    for text in chain(always, *extras.values()):
        requirement = Requirement(text)
        if requirement.name == project["name"]:  # extras of its own
            assert requirement.extras <= extras.keys()
        else:
            assert requirement.url is None, text
            assert [part.operator for part in requirement.specifier] == [">="], text


@pytest.mark.slow
def test_d32_in_an_empty_environment_the_wheel_trains_evaluates_and_predicts(wheel, tmp_path):
    """Minutes, nearly all of them for installing torch."""
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "env"], check=True)
    commands = tmp_path / "env" / ("Scripts" if os.name == "nt" else "bin")
    subprocess.run([commands / "pip", "install", "--quiet", wheel], check=True)
    folder = tmp_path / "empty"
    folder.mkdir()
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}

    def seg_torch(line: str) -> None:
        call = [commands / "seg-torch", *line.split()]
        subprocess.run(call, cwd=folder, env=environment, check=True)

    small = "data.dataset.train=16 data.dataset.val=8 data.dataset.test=8 trainer.accelerator=cpu"
    seg_torch(
        f"train trainer.max_epochs=1 trainer.devices=2 data.batch_size=4 output_dir=run {small}"
    )
    checkpoint = "run/checkpoints/best.ckpt"
    seg_torch(f"evaluate checkpoint={checkpoint} output_dir=scores trainer.accelerator=cpu")
    assert (folder / "scores/test_metrics.json").is_file()
    image = next((folder / "run").rglob("*.png"))
    seg_torch(f"predict checkpoint={checkpoint} input={image} output=predictions")
    assert list((folder / "predictions").rglob("*.png"))


def test_d33_d36_the_texts_use_the_words_of_the_field_and_no_strangers_package():
    """Images are not pictures, videos no films; `pip install seg_torch` is another project."""
    invented = (
        r"\b(pictures?|films?|processors?|labels (pictures|images|photos)|wait for company|"
        r"a row a class|can mend)\b|pip install '?seg[_-]torch"
    )
    files = [ROOT / "README.md", ROOT / "Makefile", *(ROOT / "docs").glob("*.md")]
    for folder, suffix in (("seg_torch", "py"), ("conf", "yaml"), ("benchmarks", "py")):
        files += (ROOT / folder).rglob(f"*.{suffix}")
    found = [
        f"{path.relative_to(ROOT)}: {match[0]}"
        for path in files
        for match in re.finditer(invented, path.read_text(encoding="utf-8"))
    ]
    assert not found
