"""A setting that is a path means what the user gives, whatever characters are in it."""

from itertools import cycle
from pathlib import Path

import hydra
import pytest
from conftest import SMALL_UNET, run_command
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from seg_torch.checkpoints import checkpoint
from seg_torch.cli import paths
from seg_torch.cli.overrides import complete_overrides, parse
from seg_torch.commands import COMMANDS
from seg_torch.configuration import escaped, instantiate, plain
from seg_torch.datasets import shapes, write_folder
from seg_torch.files import CONFIG_FOLDER

NAMES = (
    *("Übung", "Ångström é", "e\u0301", "Żółć", "写真", "데이터", "данные", "עברית", "🌳🚗"),
    *("two words", " before and after ", "it's", 'say "hi"', "'single'", '"double"', "back\\"),
    *("photos (1)", "[1]", "a[0]", "{}", "{a: 1}", "a=b", "lr=0.1,seed=1", ",", "cats & dogs"),
    *("#1", "a#b", "$HOME", "${oc.env:HOME}", "${}", "\\${a}", "50%", "-photos", "--cfg"),
    *("2024", "1e3", "0x10", "null", "true", "nan", "end.", "a:b;c|d", "*?", "~x", "+x", "@a^!"),
    *("???", "ü" * 127 + "x"),  # the longest that most file systems take
)


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """A folder of each name, in the current one."""
    monkeypatch.chdir(tmp_path)
    for name in NAMES:
        Path(name).mkdir()


def composed(command: str, overrides: list[str]) -> DictConfig:
    """Returns the configuration of a command line, as the command gets it."""
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(CONFIG_FOLDER), version_base="1.3"):
        cfg = hydra.compose(command, overrides)
    paths.resolve(command, cfg)
    return cfg


def settings(command: str) -> dict[str, str]:
    """Returns a choice for each setting of a command that is a path, by its name."""
    groups = {"data.root": "data=folder", "data.dataset.extra": "data=folder"}
    groups |= {"data.name": "data=hf", "data.dataset.id2label": "data=hf"}
    groups |= {"model.name": "model=hub", "model.weights": "model=fcn"}
    found = [key for key in paths.settings_of(command) if "." not in key]
    config = OmegaConf.load(CONFIG_FOLDER / f"{command}.yaml")
    chosen = {
        str(group) for entry in config.defaults if not isinstance(entry, str) for group in entry
    }
    found += [key for key in paths.IN_SECTIONS if key.split(".")[0] in chosen]
    return {key: groups.get(key, "") for key in found}


def read(cfg: DictConfig, key: str) -> object:
    value = OmegaConf.select(cfg, key)
    return list(value) if OmegaConf.is_list(value) else value


def taken(name: str, key: str) -> object:
    """Returns what a setting is expected to be: for what takes several, a list of one."""
    name = "./???" if name == "???" else name  # ??? is a missing value
    return [name] if key in paths.SEVERAL else name


@pytest.mark.parametrize("command", COMMANDS)
def test_e45_every_name_is_taken_as_it_is_by_every_setting_that_is_a_path(folders, command):
    parser = OverridesParser.create()
    names = cycle(NAMES)
    for key, choice in settings(command).items():
        for name in NAMES:
            override = complete_overrides(command, [f"{key}={name}"])[-1]
            cfg = OmegaConf.create({})
            OmegaConf.update(cfg, key, parser.parse_override(override).value())
            paths.resolve(command, cfg)
            value = read(cfg, key)
            assert value == taken(name, key), override
            # The other processes of a run are told it by their command line.
            typed = paths.as_typed(value)
            assert complete_overrides(command, [f"{key}={typed}"])[-1] == override
        # Through all of Hydra, which takes longer, with another name for each setting.
        name = next(names)
        line = [*([choice] if choice else []), f"{key}={name}"]
        cfg = composed(command, complete_overrides(command, line))
        assert read(cfg, key) == taken(name, key), line


@pytest.mark.parametrize("command", COMMANDS)
def test_e45_a_bare_path_is_the_first_setting_of_the_command(folders, command):
    key = COMMANDS[command].positional
    for name in NAMES:
        expected = complete_overrides(command, [f"{key}={name}"])
        if name != "--cfg":  # a flag: the folder is ./--cfg
            assert parse(command, [], [name]).overrides == expected


def test_e45_the_name_of_what_is_to_be_made_is_taken_as_it_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for command, key in (("train", "output_dir"), ("predict", "output")):
        for name in NAMES:
            for sweep in (False, command == "train"):
                override = complete_overrides(command, [f"{key}={name}"], sweep=sweep)[-1]
                value = OverridesParser.create().parse_override(override).value()
                assert OmegaConf.create({"x": value}).x == taken(name, key)


@pytest.mark.parametrize("text", ["~", "~/photos", "~/Übung (1)"])
def test_e45_a_tilde_is_the_home(tmp_path, monkeypatch, text):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/${me}")
    expected = text.replace("~", "/home/${me}")
    for command in COMMANDS:
        for key in settings(command):
            override = complete_overrides(command, [f"{key}={text}"])[-1]
            value = OverridesParser.create().parse_override(override).value()
            assert read(OmegaConf.create({"x": value}), "x") == taken(expected, key), key
    if text != "~":
        expected_override = complete_overrides("predict", [f"input={text}"])
        assert parse("predict", [], [text]).overrides == expected_override


def test_e45_a_path_that_is_empty_is_refused(command):
    for line in ("predict input= output=x", "train init_from=", "compare runs=[a,]"):
        code, message = command(line)
        assert code == 2
        assert "is empty: expected a path" in message


def test_e45_null_is_none_where_a_setting_may_be_none_and_nothing_is_called_so(compose):
    assert compose("export", "checkpoint=x", "output=null").output is None
    assert compose("train", "init_from=null", "resume=null").init_from is None
    assert (
        compose("train", "data=folder", "data.root=x", "model.weights=null").model.weights is None
    )


# Several values


def test_e45_in_a_sweep_commas_separate_paths_unless_one_is_called_so(
    command, stub, tmp_path, monkeypatch
):
    for name in ("a", "b", "c,d", "é,x", "it's"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    for text, expected in (
        ("a,b", ["a", "b"]),
        ("c,d", ["c,d"]),
        ("'c,d',a", ["c,d", "a"]),
        ('"é,x",it\'s', ["é,x", "it's"]),
        ("a", ["a"]),
    ):
        override = complete_overrides("train", [f"data.root={text}"], sweep=True)[-1]
        parsed = OverridesParser.create().parse_override(override)
        jobs = parsed.sweep_iterator() if parsed.is_sweep_override() else [parsed.value()]
        assert [str(getattr(job, "text", job)) for job in jobs] == expected
    seen = []
    stub(lambda cfg: seen.append(cfg.data.root))
    # Through all of Hydra, where data=FOLDER is data=auto data.root=FOLDER.
    assert command(["train", "-m", "data='c,d',\"é,x\"", "output_dir=läufe, ${1}/x"])[0] == 0
    assert seen == ["c,d", "é,x"]
    assert (tmp_path / "läufe, ${1}/x/1").is_dir()


def test_e45_several_paths_in_brackets_or_one(compose, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "[a,b]").mkdir()
    for text, expected in (
        ("a", ["a"]),
        ("[a,b]", ["[a,b]"]),
        ("[a,c]", ["a", "c"]),
        ("['a,b',\"c\",2024]", ["a,b", "c", "2024"]),
        ("[]", []),
    ):
        assert compose("compare", f"runs={text}").runs == expected
        line = ("data=folder", "data.root=x", f"data.dataset.extra={text}")
        assert compose("train", *line).data.dataset.extra == expected


# YAML files


def test_e45_paths_in_yaml_files_are_taken_as_they_are_and_a_tilde_is_the_home(
    command, stub, tmp_path, monkeypatch
):
    monkeypatch.setenv("HOME", str(tmp_path))
    experiments = tmp_path / "Mia's Ordner (1), #2 ${x}/experiment"
    experiments.mkdir(parents=True)
    for name in ("Übung", "2024", "a, b: #c"):
        (tmp_path / name).mkdir()
    (experiments / "mine.yaml").write_text(
        "# @package _global_\ndefaults:\n  - override /data: folder\n"
        "data:\n  root: 2024\n  dataset:\n    extra: ['a, b: #c', '\\${x}', ~/Übung]\n"
        "init_from: ${oc.env:HOME}/2024\noutput_dir: ~/Läufe, ü\n",
        encoding="utf-8",
    )
    seen = []
    stub(seen.append)
    line = ["train", "--config-dir", str(experiments.parent), "experiment=mine"]
    assert command([*line, "-m"])[0] == 0
    cfg = seen[0]
    assert (cfg.data.root, cfg.init_from) == ("2024", f"{tmp_path}/2024")
    assert list(cfg.data.dataset.extra) == ["a, b: #c", "${x}", f"{tmp_path}/Übung"]
    assert cfg.output_dir == f"{tmp_path}/Läufe, ü/0"
    (experiments / "mine.yaml").write_text("# @package _global_\noutput_dir: true\n")
    code, message = command(line)
    assert code == 2
    assert "output_dir=True: expected one path; in a YAML file, put quotes around" in message


def test_e45_every_setting_that_names_a_file_or_folder_is_taken_for_a_path():
    """By the comments of the YAML files, so that a new setting is not forgotten."""
    for command in COMMANDS:
        for line in (CONFIG_FOLDER / f"{command}.yaml").read_text().splitlines():
            key, _, comment = line.partition("#")
            words = {"folder", "folders", "checkpoint"} & set(comment.split())
            if key[:1].isalpha() and words:
                assert key.split(":")[0] in paths.settings_of(command), line
    for file in CONFIG_FOLDER.glob("data/*.yaml"):
        for line in file.read_text().splitlines():
            key, _, comment = line.partition("#")
            if key[:1].isalpha() and ("holds" in comment or "a folder" in comment):
                assert f"data.{key.split(':')[0]}" in paths.IN_SECTIONS, line


# What is read from a configuration


def test_e45_what_holds_a_dollar_and_a_brace_is_made_and_stored_as_it_is(tmp_path):
    for text in ("${x}", "a\\${x}", "\\\\${", "$${}", "C:\\a\\", "$x{}"):
        cfg = OmegaConf.create({"path": escaped(text), "other": {"_target_": "builtins.dict"}})
        cfg.other.path = "${path}"
        cfg.other.inside = "${path}/metrics.csv"
        assert cfg.path == text
        made = {"path": text, "inside": f"{text}/metrics.csv"}
        assert {k: str(v) for k, v in instantiate(cfg.other).items()} == made
        assert {k: str(v) for k, v in instantiate(plain(cfg.other)).items()} == made
        OmegaConf.save(plain(cfg), tmp_path / "config.yaml")
        assert OmegaConf.load(tmp_path / "config.yaml").other.inside == made["inside"]


def test_e45_all_commands_in_folders_of_odd_names(tmp_path, capsys):
    home = tmp_path / "Übung #1 = a,b ${x} it's {} (2)"
    home.mkdir()
    data, run = "Fotos, ${y}=ü", "Lauf ${now:%Y} (1), 'x'"
    samples = shapes("train", 32, train=6)
    write_folder(samples, samples.labels, home / data)

    def done(*words: str) -> None:
        assert run_command(list(words), home) == 0, capsys.readouterr().err

    cpu = ("trainer.accelerator=cpu", "data.num_workers=0")
    small = (*SMALL_UNET, "model.weights=null", "data.augment.crop=32", "data.batch_size=4", *cpu)
    done("train", data, f"output_dir={run}", "trainer.max_epochs=1", "logger=csv", *small)
    done("train", f"resume={run}", "trainer.max_epochs=2", "data.num_workers=0")
    done("evaluate", run, "output_dir=e #${}", *cpu)
    done("inspect", data, "output_dir=i, {}")
    done("compare", run, "output_dir=c=1")
    done("predict", f"input={data}/images", f"checkpoint={run}", "output=p ü", cpu[0])
    found = {path.name for path in home.iterdir()}
    assert found == {data, run, "e #${}", "i, {}", "c=1", "p ü"}
    assert len((home / run / "metrics.csv").read_text().splitlines()) == 3
    assert (home / run / "csv/metrics.csv").is_file()
    assert len(list((home / "p ü/mask").iterdir())) == 6
    assert OmegaConf.load(home / run / "config.yaml").data.root == data
    description = checkpoint.read(home / run)[checkpoint.KEY]
    assert "${y}" in description["data"]["root"]
