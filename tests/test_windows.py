"""What differs on Windows and macOS, as far as it can be shown elsewhere."""

import ast
import io
import multiprocessing
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from conftest import ROOT, run_command
from PIL import Image
from torch.utils.data import DataLoader

from seg_torch.data import cache
from seg_torch.data.sampling import ResizedSamples
from seg_torch.datasets import shapes
from seg_torch.datasets.base import as_dataset
from seg_torch.prediction.folder import find_images

SOURCES = sorted((ROOT / "seg_torch").rglob("*.py"))


@pytest.fixture
def chinese(tmp_path) -> Path:
    """A dataset whose classes have no letters that a console of Windows knows."""
    root = tmp_path / "data"
    for folder in ("images", "masks"):
        (root / folder).mkdir(parents=True)
    for i in range(10):
        Image.fromarray(np.full((32, 32, 3), 20 * i, np.uint8)).save(root / f"images/图{i}.png")
        Image.fromarray(np.full((32, 32), i % 2, np.uint8)).save(root / f"masks/图{i}.png")
    (root / "classes.txt").write_text("背景\n车\n", encoding="utf-8")
    return root


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_a_console_without_the_letters_of_a_class_shows_their_codes(
    chinese, tmp_path, monkeypatch, encoding
):
    console = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="strict")
    monkeypatch.setattr(sys, "stdout", console)
    assert run_command(f"inspect data.root={chinese} output_dir=report", tmp_path) == 0
    console.flush()
    printed = console.buffer.getvalue().decode(encoding)
    assert "\\u80cc\\u666f" in printed
    assert "Traceback" not in printed
    assert "背景" in (tmp_path / "report/inspect.html").read_text(encoding="utf-8")


def calls(tree: ast.AST, *names: str) -> list[ast.Call]:
    """All calls of functions and methods of these names."""
    found = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return [call for call in found if ast.unparse(call.func).rpartition(".")[2] in names]


def test_every_text_file_is_read_and_written_in_an_encoding_that_is_named():
    """That of Windows is another one, and differs between countries."""
    for path in SOURCES:
        for call in calls(ast.parse(path.read_text(encoding="utf-8")), "open", "read_text"):
            text = ast.unparse(call)
            of_library = text.startswith(
                ("os.", "Image.", "installed.", "av.", "archive.", "webbrowser.")
            )
            binary = any(mode in text for mode in ("'rb'", "'wb'", "'ab'", "format.open("))
            assert of_library or binary or "encoding=" in text, f"{path.name}: {text}"


# What the standard library has on POSIX systems alone.
POSIX = "fcntl resource pwd grp termios tty pty SIGUSR1 SIGUSR2 SIGHUP SIGKILL getuid geteuid fork "
POSIX += "killpg setsid sysconf sched_getaffinity sigwaitinfo pthread_sigmask register_at_fork "
POSIX += "symlink mkfifo"


def test_what_only_posix_systems_have_is_asked_for_before_it_is_used():
    """By hasattr, by the name of the system, or in a job of Slurm, which runs on Linux alone."""
    guards = ("hasattr(", "sys.platform", "os.name", "SLURM_JOB_ID", "sigwaitinfo({")
    for path in SOURCES:
        text = path.read_text(encoding="utf-8")
        lines = text.splitlines()
        for node in ast.walk(ast.parse(text)):
            names = [node.attr] if isinstance(node, ast.Attribute) else []
            names += [alias.name for alias in getattr(node, "names", []) if hasattr(alias, "name")]
            if set(names) & set(POSIX.split()):
                near = "\n".join(lines[max(0, node.lineno - 10) : node.lineno])
                assert any(guard in near for guard in guards), f"{path.name}:{node.lineno} {names}"


def test_samples_on_disk_reach_workers_that_are_started_anew(tmp_path, monkeypatch):
    """As on Windows, where nothing is forked and the file is opened by its name."""
    monkeypatch.setattr("seg_torch.data.cache.reduction", SimpleNamespace())
    samples = ResizedSamples(as_dataset(shapes("val", 32)), None, False)
    cache.write_samples(samples, tmp_path / "samples.bin")
    file = (tmp_path / "samples.bin").open("rb")
    cached = cache._map_file(file)
    context = multiprocessing.get_context("spawn")
    loader = DataLoader(cached, batch_size=None, num_workers=1, multiprocessing_context=context)
    image, mask = next(iter(loader))
    assert (image == samples[0][0]).all()
    assert (mask == samples[0][1]).all()
    file.close()


def test_names_of_outputs_differ_in_more_than_upper_and_lower_case(tmp_path):
    """Many file systems of Windows and macOS do not tell `A.png` from `a.png`."""
    for name in ("a.jpg", "A.png", "b.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    names = list(find_images(tmp_path))
    assert len({name.casefold() for name in names}) == len(names) == 3


def test_the_workflow_runs_tests_that_exist_on_three_systems():
    workflow = yaml.safe_load((ROOT / ".github/workflows/tests.yml").read_text(encoding="utf-8"))
    matrix = workflow["jobs"]["tests"]["strategy"]["matrix"]
    assert [name.partition("-")[0] for name in matrix["os"]] == ["ubuntu", "macos", "windows"]
    assert matrix["python"] == ["3.10", "3.13"]
    words = workflow["jobs"]["tests"]["steps"][-1]["run"].split()
    assert all((ROOT / word).exists() for word in words if word.startswith("tests/"))
