"""What `--help` shows."""

import re

import pytest
from omegaconf import OmegaConf

from seg_torch.files import CONFIG_FOLDER


@pytest.mark.parametrize("name", ["train", "evaluate", "predict"])
def test_d34_help_shows_examples_choices_and_every_setting_with_its_comment(name, compose, run_as):
    page = run_as(f"{name}.py -h").stdout
    assert "Hydra" not in page
    assert f"Usage: python {name}.py [key=value ...]" in page
    assert page.count(f"\n  python {name}.py") >= 3
    assert not re.search(r"[ =](default|from_checkpoint)( |$)", page, re.MULTILINE)

    def check(node, prefix=""):
        for key, value in node.items():
            if isinstance(value, dict) and value:
                check(value, f"{prefix}{key}.")
            elif key == "_target_":
                assert f"  {prefix.rstrip('.')}: {value}" in page
            elif key != "_partial_":
                assert f"\n  {prefix}{key}=" in page

    check(OmegaConf.to_container(compose(name)))
    for comment in re.findall(
        r"^\w+: .*#\s*(.{10,40})", (CONFIG_FOLDER / f"{name}.yaml").read_text(), re.M
    ):
        assert " ".join(comment.split()) in " ".join(page.split())


def test_d34_help_follows_the_choices_of_the_command_line(run_as, tmp_path):
    (tmp_path / "mine/model").mkdir(parents=True)
    (tmp_path / "mine/model/own.yaml").write_text("_target_: my.net\nwidth: 3   # of each layer\n")
    page = run_as("train.py model=smp data=folder -h").stdout
    assert re.search(r"model.architecture=Unet +or FPN", page)
    assert "data.root=???" in page
    assert "data.dataset.train" not in page
    page = run_as("-m seg_torch train --config-dir=mine model=own -h").stdout
    assert re.search(r"model.width=3 +of each layer", page)
    assert re.search(r"model= .* own ", page)


def test_commands_are_listed_with_a_line_each(run_as):
    for line in ("-m seg_torch", "-m seg_torch --help", "-m seg_torch -h"):
        result = run_as(line)
        assert result.returncode == 0
        assert re.search(r"\n  train +Train a segmentation model", result.stdout)
        assert re.search(r"\n  predict +Segment images", result.stdout)
    result = run_as("-m seg_torch evalate")
    assert result.returncode == 2
    assert "no command evalate; did you mean evaluate?" in result.stderr
    assert run_as("-m seg_torch --version").stdout == run_as("train.py --version").stdout
