"""What a message says to install works for whoever reads it."""

import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT
from packaging.requirements import Requirement

from seg_torch.errors import InputError, install_command, require
from seg_torch.version import REPOSITORY


def test_e47_in_a_checkout_the_command_installs_the_checkout(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    assert install_command("onnx") == "pip install -e '.[onnx]'"
    monkeypatch.chdir(tmp_path)
    assert install_command("onnx") == f"pip install -e '{ROOT}[onnx]'"
    with pytest.raises(
        InputError, match=r"^this needs no_such_thing: pip install -e '.*\[tiff\]'$"
    ):
        require("this", "tiff", "json", "no_such_thing")


def test_e47_from_a_wheel_the_command_names_the_wheel_or_else_the_packages(tmp_path):
    """Where nothing but the installed files is there, as pip leaves them."""
    pip = [sys.executable, "-m", "pip"]
    build = [*pip, "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", tmp_path]
    subprocess.run([*build, ROOT], check=True)
    wheel = next(tmp_path.glob("*.whl"))
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    script = "from seg_torch.errors import install_command as command; print(command('openvino'))"

    def command() -> str:
        return subprocess.run(
            [sys.executable, "-c", script],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(site)},
            check=True,
            capture_output=True,
            text=True,
        ).stdout.strip()

    packages = [Requirement(text.strip("'")) for text in command().split()[2:]]
    assert {p.name for p in packages} == {"openvino", "nncf", "onnx", "onnxscript", "onnxruntime"}
    source = next(site.glob("*.dist-info")) / "direct_url.json"
    source.write_text(json.dumps({"url": wheel.as_uri(), "archive_info": {}}))
    assert command() == f"pip install '{wheel}[openvino]'"
    # pip finds the wheel and the extra by it.
    line = [*pip, "install", "--dry-run", "--no-deps", "--no-index", f"{wheel}[openvino]"]
    result = subprocess.run(line, check=True, capture_output=True, text=True)
    assert "does not provide" not in result.stderr


def test_e47_every_install_line_is_one_that_works():
    """An index has no segwright, and zsh takes bare brackets for a pattern."""
    files = [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
    for folder, suffix in (
        *(("docs", "md"), ("docs", "ipynb"), ("conf", "yaml"), ("seg_torch", "py")),
        *(("seg_torch", "md"), ("benchmarks", "py")),
    ):
        files += (ROOT / folder).rglob(f"*.{suffix}")
    for file in files:
        text = file.read_text(encoding="utf-8")
        for line in re.findall(r"pip install [^`\n]*\[[^`\n]*", text):
            assert re.search(r"""['"\\]+[^'" ]*\[.*\][^'" ]*\\?['"]""", line), f"{file}: {line}"
        assert not re.search(r"pip install '?segwright('|\[|$)", text), file
        if file.name != "version.py":
            assert REPOSITORY not in text, f"{file}: the address is in seg_torch/version.py alone"
    assert "https://pytorch.org/get-started/locally/" in (ROOT / "README.md").read_text("utf-8")
    assert Path(ROOT, "seg_torch/version.py").read_text().count(REPOSITORY) == 1
