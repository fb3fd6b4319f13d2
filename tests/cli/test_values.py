"""Values of another type or out of their range."""

import pytest
from omegaconf import OmegaConf


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("train data.resize=[128]", "data.resize=[128]: expected two numbers, such as [256,256]"),
        ("train data.resize=0", "data.resize=[0,0]: expected 1 to 8192"),
        ("train data.resize=[9000,9000]", "expected 1 to 8192"),  # a checkpoint cannot hold it
        ("train data.resize=big", "data.resize=big: expected two numbers"),
        ("train data.max_side=[640]", "data.max_side=[640]: expected a whole number, such as 640"),
        ("train data.max_side=16", "data.max_side=16: expected 32 to 8192"),
        ("train data.max_side=9000", "data.max_side=9000: expected 32 to 8192"),
        ("train data.augment.crop=-3", "data.augment.crop=[-3,-3]: expected at least 1"),
        ("train data.augment.crop=[1,2,3]", "data.augment.crop=[1,2,3]: expected two numbers"),
        ("train data.augment.scale=0.5", "scale=0.5: expected two numbers, such as [0.5,2.0]"),
        ("train data.augment.flip=2", "data.augment.flip=2: expected 0 to 1"),
        ("train data.augment.flip=nan", "data.augment.flip=NaN: expected a number"),
        ("train data.augment.paste=2", "data.augment.paste=2: expected 0 to 1"),
        ("train data.repeat=0", "data.repeat=0: expected at least 1"),
        ("train data.augment.hue=1", "data.augment.hue=1: expected 0 to 0.5"),
        ("train data.augment.jitter=-1", "data.augment.jitter=-1: expected at least 0"),
        ("train data.num_workers=-1", "data.num_workers=-1: expected at least 0"),
        ("train data.num_workers=few", "data.num_workers=few: expected a whole number"),
        ("train data.eval_batch_size=0", "data.eval_batch_size=0: expected at least 1"),
        ("train model.decoder_channels=16", "model.decoder_channels=16: expected numbers"),
        ("train ema=yes", "ema=yes: expected a number"),
        ("train seed=[1,2]", "seed=[1,2]: expected a whole number"),
        ("predict x max_pixels=abc", "max_pixels=abc: expected a number"),
        ("predict x batch_size=0", "batch_size=0: expected at least 1"),
        ("predict x min_confidence=2", "min_confidence=2: expected 0 to 1"),
        ("predict input=[a,b] output=2024", "input=[a,b]: no such file or folder"),
        ("predict x save=[mask,masks]", "save is 'masks'; use one of legend"),
        ("predict x save=masks", "save is 'masks'; use one of legend"),
    ],
)
def test_e43_a_value_that_cannot_be_used_is_named(command, tmp_path, line, expected):
    (tmp_path / "x").mkdir()
    code, message = command(line)
    assert code == 2
    assert expected in message
    assert "Traceback" not in message


def test_e43_a_value_that_can_mean_one_thing_is_taken_for_that(
    command, stub, tmp_path, monkeypatch
):
    import seg_torch.commands.predict as module

    seen = []
    stub(seen.append)
    assert command("train data.resize=256 data.augment.crop=128") == (0, "")
    assert seen[-1].data.resize == [256, 256]
    assert seen[-1].data.augment.crop == [128, 128]
    assert command("train data.augment.jitter=[0.1,0.2,0] data.augment.scale=[1,2]") == (0, "")
    monkeypatch.setattr(module, "predict", seen.append)
    (tmp_path / "x").touch()
    for line, save in (("save=mask", ["mask"]), ("save=mask,overlay", ["mask", "overlay"])):
        assert command(f"predict x {line} trust=mine output=2024 max_pixels=2e9") == (0, "")
        assert (seen[-1].save, seen[-1].trust) == (save, ["mine"])
        assert (seen[-1].output, seen[-1].max_pixels) == ("2024", 2e9)


@pytest.mark.parametrize("tta", ["[nan]", "inf", "[flip,0]", "flop"])
def test_e43_scales_of_test_time_augmentation_are_numbers_above_0(command, tmp_path, tta):
    (tmp_path / "x.jpg").touch()
    code, message = command(f"predict x.jpg model.weights=null tta={tta}")
    assert code == 2
    assert "tta" in message
    assert "expected" in message


def test_e45_text_that_hydra_cannot_read_is_taken_as_it_is(command, compose):
    for text in ("Straße", "sky (blue) & clouds", "it's", "写真 #1", "{", "a=b"):
        line = ("data=coco", "data.root=x", f"data.dataset.background={text}")
        assert compose("train", *line).data.dataset.background == text
    code, message = command("train Übung=3")
    assert (code, message) == (2, "error: there is no setting Übung\n")


@pytest.mark.parametrize(
    ("value", "groups"),
    [
        ("{vehicle:[car,truck],road:road}", {"vehicle": ["car", "truck"], "road": "road"}),
        ("'{vehicle: [car, truck]}'", {"vehicle": ["car", "truck"]}),
        (
            "{Straße 1.a: [traffic light, semi-truck (big)], 'x: y': [\"a, b\", O'Hare]}",
            {"Straße 1.a": ["traffic light", "semi-truck (big)"], "x: y": ["a, b", "O'Hare"]},
        ),
        (
            "{no: [1, 007, true, null, '${b}'], b: []}",
            {"no": ["1", "007", "true", "null", "${b}"], "b": []},
        ),
        ("null", None),
    ],
)
def test_groups_of_classes_are_yaml_in_which_every_name_is_a_text(command, stub, value, groups):
    seen = []
    stub(seen.append)
    assert command(["train", f"data.classes={value}"]) == (0, "")
    assert OmegaConf.to_container(seen[-1].data, resolve=True)["classes"] == groups


def test_groups_of_classes_take_the_place_of_those_of_a_file(command, stub, tmp_path):
    seen = []
    stub(seen.append)
    (tmp_path / "mine/experiment").mkdir(parents=True)
    text = "# @package _global_\ndata:\n  classes: {a: disc, b.c: [ring, star]}\n  rest: ignore\n"
    (tmp_path / "mine/experiment/few.yaml").write_text(text)
    line = ["train", "data=shapes", "+experiment=few", "--config-dir", "mine"]
    line[2] = "experiment=few"
    assert command(line) == (0, "")
    assert seen[-1].data.classes == {"a": "disc", "b.c": ["ring", "star"]}
    assert command([*line, "data.classes={d: disc}"]) == (0, "")
    assert seen[-1].data.classes == {"d": "disc"}


def test_each_job_of_a_sweep_has_its_own_groups_of_classes(command, stub):
    seen = []
    stub(seen.append)
    value = "data.classes={b:[disc,ring]},null"
    assert command(["train", "-m", value, "hydra.sweep.dir=jobs"])[0] == 0
    assert [cfg.data.classes for cfg in seen] == [{"b": ["disc", "ring"]}, None]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            "=road:road",
            "data.classes=road:road: expected groups, in quotes: data.classes='{vehicle",
        ),
        ("={a: disc, b: ring, a: star}", "a new class is there twice"),
        (
            ".a=[disc]",
            "no setting data.classes.a; write data.classes='{NEW: [OLD, OLD], NEW: OLD}'",
        ),
    ],
)
def test_groups_of_classes_in_another_form_are_refused(command, value, message):
    code, text = command(["train", f"data.classes{value}"])
    assert code == 2
    assert message in text
