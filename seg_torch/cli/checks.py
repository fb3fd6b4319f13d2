"""What is wrong in a configuration, said before anything heavy is imported."""

from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.utils import get_method
from omegaconf import DictConfig, OmegaConf

from seg_torch.checkpoints.moved import with_current_names
from seg_torch.cli.help import compose, settings
from seg_torch.cli.messages import as_text, did_you_mean
from seg_torch.cli.overrides import Call, groups
from seg_torch.commands import COMMANDS
from seg_torch.errors import InputError, require
from seg_torch.files import CONFIG_FOLDER
from seg_torch.training import run

# Settings below the top level that null would break.
NOT_NULL = ["data.dataset", "data.batch_size", "optimizer.lr", "trainer.devices"]
FILES = ["checkpoint", "init_from", "input", "data.root", "model.weights"]
EXPECTED = {bool: "true or false", int: "a whole number", float: "a number"}
WEIGHTS = (".pth", ".pt", ".ckpt", ".bin", ".safetensors")


def checked(call: Call, cfg: DictConfig) -> DictConfig:
    """Return the configuration of a job, that of its run where it goes on with one.

    Raises:
        InputError: Something is wrong in it, or a package is missing.
    """
    overrides, files = list(HydraConfig.get().overrides.task), FILES
    comments: dict[str, str] = {}
    if call.command == "train" and cfg.get("resume"):
        cfg, defaults = run.resumed_config(cfg, overrides), run.resumed_config(cfg, [])
        files = ["data.root"]
    else:
        name = str(HydraConfig.get().job.config_name)
        defaults, comments = _defaults(call, overrides, name)
        cfg, defaults = _with_current_names(cfg), _with_current_names(defaults)
    if "callbacks" in defaults and cfg.get("callbacks") is None:
        OmegaConf.update(cfg, "callbacks", {}, force_add=True)
    for key in [*map(str, defaults), *NOT_NULL]:
        default = OmegaConf.select(defaults, key)
        if default not in (None, "auto") and OmegaConf.select(cfg, key) is None:
            raise InputError(f"{key} must not be null")
    for key in sorted(OmegaConf.missing_keys(cfg)):
        raise InputError(f"{key} must be given: {comments.get(key, 'no default')}")
    _check_type("", OmegaConf.to_container(cfg), OmegaConf.to_container(defaults))
    for key in files:
        _check_file(cfg, key, OmegaConf.select(cfg, key))
    require(call.command, call.command, *COMMANDS[call.command].packages)
    for logger in {"wandb", "mlflow"} & cfg.get("logger", {}).keys():
        require(f"logger={logger}", logger, logger)
    return cfg


def unknown_setting(call: Call, key: str) -> str:
    """Return a message with the nearest settings, given the other choices of the command line."""
    for_one_job = [override for override in call.overrides if "," not in override]
    cfg, _ = _defaults(call, for_one_job, call.command)
    keys = [name for name, _ in settings(OmegaConf.to_container(cfg))]
    message = f"there is no setting {key}{did_you_mean(key, {*groups(call.command), *keys})}"
    if key.rpartition(".")[0] in keys:
        message += f"\n+{key}=VALUE adds it, for a function that takes it"
    return message


def _defaults(call: Call, overrides: list[str], name: str) -> tuple[DictConfig, dict[str, str]]:
    """Return the configuration `name` with the choices among the overrides alone, and comments."""
    choices = [o for o in overrides if run.key_of(o) in groups(call.command)]
    return compose(name, choices, call.config_dir)


def _with_current_names(cfg: DictConfig) -> DictConfig:
    """Return the configuration with the names of today; a user's own files may have older ones."""
    renamed = with_current_names(OmegaConf.to_container(cfg))
    return OmegaConf.merge(cfg, renamed)  # type: ignore[return-value]


def _check_type(key: str, value: Any, default: Any) -> None:
    """Refuse a value of another type than the default, also in lists and in sections."""
    if value is None or (isinstance(value, str) and "${" in value):
        return
    if default is None:  # such as the demo's data.augment.crop, which the file below it gives
        group, _, name = key.partition(".")
        path = CONFIG_FOLDER / group / "default.yaml"
        default = OmegaConf.select(OmegaConf.load(path), name) if path.is_file() else None
        default = OmegaConf.to_container(default) if OmegaConf.is_config(default) else default
    if isinstance(default, dict):
        if not isinstance(value, dict):
            raise InputError(f"{key}={as_text(value)}: expected {key}.KEY=VALUE")
        if value.get("_target_") == default.get("_target_"):
            for name in value.keys() & default.keys():
                _check_type(f"{key}.{name}".lstrip("."), value[name], default[name])
        return
    items = value if isinstance(value, list) else [value]
    sample = default[0] if isinstance(default, list) and default else default
    kind = type(sample)
    if kind is int and list in (type(value), type(default)):
        kind = float  # lists may mix them
    if kind not in EXPECTED or (key, value) == ("trainer.deterministic", "warn"):
        return
    kinds = (int, float) if kind is float else (kind,)
    if not all(type(item) in kinds for item in items):
        expected = EXPECTED[kind]
        expected = expected.removeprefix("a ") + "s" if isinstance(default, list) else expected
        raise InputError(f"{key}={as_text(value)}: expected {expected}, such as {as_text(default)}")


def _check_file(cfg: DictConfig, key: str, value: Any) -> None:
    if not isinstance(value, str) or Path(value).expanduser().exists():
        return
    if key in ("checkpoint", "init_from") and value.startswith("hf://"):
        return  # of the Hugging Face Hub
    download = cfg.data.get("download") if key == "data.root" else None
    # Other values of model.weights are names of published ones.
    is_path = value.startswith((".", "/", "~")) or value.endswith(WEIGHTS)
    if (is_path or key != "model.weights") and not download:
        hint = "" if download is None else "; data.download=true fetches the dataset"
        if key == "data.root":
            hint += _how_to_get(str(OmegaConf.select(cfg, "data.dataset._target_")), value)
        raise InputError(f"{key}={value}: no such file or folder{hint}")


def _how_to_get(dataset: str, root: str) -> str:
    """Return what a dataset of this package says where its folder is missing."""
    if dataset.startswith("seg_torch.datasets."):
        try:
            get_method(dataset)(root=root, split="train")
        except InputError as error:
            return f"\n{error}"
    return ""
