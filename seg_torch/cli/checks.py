"""What is wrong in a configuration, said before anything heavy is imported."""

from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.utils import get_method
from omegaconf import DictConfig, OmegaConf

from seg_torch.checkpoints.moved import with_current_names
from seg_torch.cli import names, paths, values
from seg_torch.cli.help import compose, settings
from seg_torch.cli.overrides import Call, given_settings, groups
from seg_torch.commands import COMMANDS
from seg_torch.errors import InputError, require
from seg_torch.planning.budget import seconds_of
from seg_torch.training import run

# Settings below the top level that null would break.
NOT_NULL = ["data.dataset", "data.batch_size", "optimizer.lr", "trainer.devices"]
NOT_NULL += ["trainer.max_steps"]  # -1 is no limit
FILES = ["checkpoint", "init_from", "input", "data.root", "model.weights"]
EXPECTED = {bool: "true or false", int: "a whole number", float: "a number"}
# What models need besides what is always installed: the extra, and the package.
MODEL_PACKAGES = {
    "seg_torch.models.smp": ("smp", "segmentation_models_pytorch"),
    "seg_torch.models.transformers": ("transformers", "transformers"),
}
# Functions of ours that take more than their YAML files say; of all others we know everything.
TAKE_MORE = ("seg_torch.datasets.auto", "seg_torch.losses.CrossEntropyLoss")
# Sections without a function of their own, and what is given what is in them.
PASSED_ON = {"trainer": "Lightning's Trainer", "model.config": "the model"}
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
        if "recipe" in cfg:
            _prepare_plan(call, cfg, overrides)
    if "callbacks" in defaults and cfg.get("callbacks") is None:
        OmegaConf.update(cfg, "callbacks", {}, force_add=True)
    for key in [*map(str, defaults), *NOT_NULL]:
        default = OmegaConf.select(defaults, key)
        if default not in (None, "auto") and OmegaConf.select(cfg, key) is None:
            raise InputError(f"{key} must not be null")
    for key in sorted(OmegaConf.missing_keys(cfg)):
        raise InputError(f"{key} must be given: {comments.get(key, 'no default')}")
    for each in (cfg, defaults):
        paths.resolve(call.command, each)
    values.check(cfg, defaults)
    for key in files:
        _check_file(cfg, key, OmegaConf.select(cfg, key))
    require(call.command, call.command, *COMMANDS[call.command].packages)
    for logger in {"wandb", "mlflow"} & cfg.get("logger", {}).keys():
        require(f"logger={logger}", logger, logger)
    target = str(OmegaConf.select(cfg, "model._target_"))
    if target in MODEL_PACKAGES and not cfg.get("checkpoint"):
        extra, package = MODEL_PACKAGES[target]
        require(f"the model of {target}", extra, package)
    return cfg


def _prepare_plan(call: Call, cfg: DictConfig, overrides: list[str]) -> None:
    """Note which settings are the user's; those of an experiment all stay.

    Raises:
        InputError: The recipe or the budget is none.
    """
    choices: Any = OmegaConf.to_container(HydraConfig.get().runtime.choices)
    if cfg.recipe not in (None, "auto"):
        raise InputError(f"recipe={cfg.recipe}: expected auto or null")
    if cfg.budget is not None:
        seconds_of(cfg.budget)
    if choices.get("experiment"):
        cfg.recipe = None
    given = given_settings(overrides, choices, call.config_dir)
    OmegaConf.update(cfg, "given", given, force_add=True)


def unknown_setting(call: Call, key: str) -> str | None:
    """Return what to write instead, given the other choices of the command line.

    `None` where there is such a setting.
    """
    for_one_job = [override for override in call.overrides if "," not in override]
    cfg, _ = _defaults(call, for_one_job, call.command)
    keys = [*groups(call.command), *(name for name, _ in settings(OmegaConf.to_container(cfg)))]
    if key in keys:
        return None
    value = next(o.partition("=")[2] for o in call.overrides if run.key_of(o) == key)
    if instead := names.instead_of(key, value, keys):
        return f"there is no setting {key}; {instead}"
    near = names.nearest(key, keys)
    message = f"there is no setting {key}" + f"; did you mean {' or '.join(near)}?" * bool(near)
    section = key.rpartition(".")[0]
    target = OmegaConf.select(cfg, f"{section}._target_") or PASSED_ON.get(section, "")
    ours = target.startswith("seg_torch.") and target not in TAKE_MORE
    if section in keys and target and not ours:
        message += f"\n+{key}=VALUE adds it, if {target} takes it"
    return message


def _defaults(call: Call, overrides: list[str], name: str) -> tuple[DictConfig, dict[str, str]]:
    """Return the configuration `name` with the choices among the overrides alone, and comments."""
    choices = [o for o in overrides if run.key_of(o) in groups(call.command)]
    return compose(name, choices, call.config_dir)


def _with_current_names(cfg: DictConfig) -> DictConfig:
    """Return the configuration with the names of today; a user's own files may have older ones."""
    renamed = with_current_names(OmegaConf.to_container(cfg))
    return OmegaConf.merge(cfg, renamed)  # type: ignore[return-value]


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
