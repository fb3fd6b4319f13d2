"""Names of settings that do not exist here: what they are called."""

import difflib
from collections.abc import Collection, Sequence

# Names that other programs have -> where it is set here. A command has the first of them that is
# among its settings.
SYNONYMS = {
    "epochs": ("trainer.max_epochs",),
    "num_epochs": ("trainer.max_epochs",),
    "batch": ("data.batch_size", "batch_size", "max_batch_size"),
    "bs": ("data.batch_size", "batch_size", "max_batch_size"),
    "lr0": ("optimizer.lr",),
    "learning_rate": ("optimizer.lr",),
    "wd": ("optimizer.weight_decay",),
    "gpus": ("trainer.devices",),
    "amp": ("trainer.precision",),
    "early_stopping": ("patience",),
    "source": ("input", "data.root"),
    "images": ("input", "data.root"),
    "root": ("data.root", "input"),
    "dataset": ("data",),
    "project": ("output_dir", "output"),
    "out": ("output", "output_dir"),
    "out_dir": ("output_dir", "output"),
    "output": ("output_dir",),
    "pretrained": ("model.weights", "checkpoint"),
    "ckpt": ("checkpoint", "init_from"),
    "optim": ("optimizer",),
}
SIZES = ("imgsz", "img_size", "image_size", "input_size", "size", "crop_size")
CLASSES = ("classes", "num_classes", "nc", "class_names")


def instead_of(key: str, value: str, names: Collection[str]) -> str | None:
    """Return what to do for a setting that does not exist, `None` where nobody knows.

    Args:
        key: Its name.
        value: What it was to be.
        names: All settings and groups of the command.
    """
    scores = "data.eval_batch_size" in names and "optimizer" not in names
    if key == "workers" and "data.num_workers" in names:
        return f"write data.num_workers={value}"
    if key == "device" and "trainer.accelerator" in names:
        return f"write {_device(value)}"
    if key in SIZES and "data.augment.crop" in names:
        sides, whole = f"[{value},{value}]", f"data.max_side={value}"
        if value.startswith("["):
            sides, whole = value, f"data.resize={value}"
        return (
            f"write {whole} for whole images of that size, or data.augment.crop={sides} for "
            "windows of it"
        )
    if key.startswith("data.classes."):
        return "write data.classes='{NEW: [OLD, OLD], NEW: OLD}', all of it in quotes"
    if key in CLASSES:
        return (
            "the classes are those of the data: of classes.txt, or of the annotations. "
            "data.classes='{NEW: [OLD, OLD]}' makes others of them"
        )
    if scores and key in ("batch", "bs", "batch_size"):
        return f"write data.eval_batch_size={value}"
    if key == "amp":
        value = "32-true" if value.lower() == "false" else "16-mixed"
    found = [name for name in SYNONYMS.get(key, ()) if name in names]
    found = found or [name for name in sorted(names) if _last(name) == key != name]
    return f"write {found[0]}={value}" if len(found) == 1 or (key in SYNONYMS and found) else None


def _device(value: str) -> str:
    """Return what says where to work: cpu, cuda, mps, or the numbers of GPUs."""
    numbers = value.removeprefix("cuda:").strip("[]")
    if numbers.replace(",", "").isdigit():
        return f"trainer.devices=[{numbers}]"
    return f"trainer.accelerator={'gpu' if value == 'cuda' else value}"


def nearest(key: str, names: Collection[str]) -> Sequence[str]:
    """Return the names that are most like a key, at most two; their last parts must be alike."""
    alike = difflib.get_close_matches(_last(key), {_last(name) for name in names}, 5, 0.7)

    def distance(name: str) -> float:
        return -difflib.SequenceMatcher(None, key, name).ratio()

    return sorted((name for name in names if _last(name) in alike), key=distance)[:2]


def _last(name: str) -> str:
    return name.rpartition(".")[2]
