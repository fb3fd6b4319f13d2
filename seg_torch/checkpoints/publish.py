"""Writing a network as a model of the Hugging Face Hub, and uploading it.

`seg_torch.checkpoints.checkpoint` reads these files: model.safetensors and config.json.
"""

import json
import logging
import sys
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import safetensors.torch
from huggingface_hub import EvalResult, HfApi, ModelCardData
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError
from omegaconf import MISSING
from PIL import Image

from seg_torch.checkpoints.checkpoint import CONFIG, HUB_SCHEME, KEY, WEIGHTS
from seg_torch.checkpoints.trusted import nodes
from seg_torch.drawing.page import render
from seg_torch.drawing.visualize import legend
from seg_torch.errors import InputError, reason
from seg_torch.files import write_atomically, write_text
from seg_torch.images.resize import in_words
from seg_torch.labels import Labels
from seg_torch.models.network import Network
from seg_torch.version import REPOSITORY, __version__

log = logging.getLogger(__name__)

CARD, SCORES, EXAMPLE, COLOURS = "README.md", "test_metrics.json", "example.jpg", "classes.png"
# Scores of the card, by their name in test_metrics.json.
SHOWN = {
    "mean_iou": "Mean IoU",
    "pixel_accuracy": "Pixel accuracy",
    "mean_accuracy": "Mean accuracy",
    "mean_dice": "Mean Dice",
}
# Texts in the configuration of data that cannot name a file, a folder or a person.
PUBLIC_TEXTS = ("_target_", "background", "cache", "year")
LIBRARIES = ("torch", "torchvision", "timm", "transformers", "segmentation_models_pytorch")


def write_model(
    folder: Path,
    name: str,
    network: Network,
    description: dict[str, Any],
    scores: Path | None = None,
    example: Image.Image | None = None,
    license: str | None = None,
) -> None:
    """Write the weights, the description, the model card and the scores of a network.

    Args:
        folder: Where to; made if need be.
        name: What the card calls the model: `OWNER/NAME`, or a folder.
        network: With weights of 32 bits.
        description: See `seg_torch.checkpoints.checkpoint.describe`.
        scores: A test_metrics.json.
        example: An image beside its overlay, for the card.
        license: As the Hub names it, such as `apache-2.0`.

    Raises:
        InputError: The folder is not empty, the model's configuration names files, or the scores
            cannot be read.
        OSError: A file cannot be written.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} is there already and not empty; give the name of a new folder")
    description = _public(description)
    results = None if scores is None else _read_scores(scores)
    state = {key: value.cpu().contiguous().clone() for key, value in network.state_dict().items()}
    # Transformers' own loaders ask for the format.
    content = safetensors.torch.save(state, metadata={"format": "pt"})
    write_atomically(folder / WEIGHTS, lambda path: Path(path).write_bytes(content))
    _write_json(folder / CONFIG, {KEY: description})
    if results is not None:
        _write_json(folder / SCORES, results)
    if example is not None:
        write_atomically(folder / EXAMPLE, partial(example.save, quality=90))
    labels = Labels.from_dict(description["labels"])
    write_atomically(folder / COLOURS, legend(labels).save)
    card = _card(name, description, labels, results, example is not None, license)
    write_text(folder / CARD, card)


def upload(folder: Path, name: str, private: bool, message: str) -> str:
    """Upload a folder as a repository of the Hub, which is made if need be; returns its address.

    Raises:
        InputError: Nobody is logged in, the account may not write there, the name is none, or the
            Hub cannot be reached.
    """
    try:
        api = HfApi()
        address = str(api.create_repo(name, private=private, exist_ok=True))
        api.upload_folder(repo_id=name, folder_path=folder, commit_message=message)
    except Exception as error:  # whatever the HTTP library of the installed version raises
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status == 401 or isinstance(error, LocalTokenNotFoundError):
            why = "not logged in: run hf auth login, or set HF_TOKEN, with a token that may write"
        elif status in (403, 404):
            owner = name.split("/")[0]
            why = f"the token in use may not write there; is {owner} your account or organisation?"
        elif isinstance(error, HFValidationError | HfHubHTTPError):
            why = f"the Hugging Face Hub refused it: {reason(error)}"
        else:
            keep = "Segmenter.save_pretrained(FOLDER) keeps the files meanwhile"
            why = f"the Hugging Face Hub cannot be reached ({error}); {keep}"
        raise InputError(f"push_to_hub({name!r}): {why}") from error
    return address


def _public(description: dict[str, Any]) -> dict[str, Any]:
    """Return a description without what is this machine's or its user's alone.

    Raises:
        InputError: The model's configuration names a file or a repository.
    """
    model, data = dict(description["model"]), dict(description["data"])
    if "weights" in model:
        model["weights"] = None  # they are in the file
    for text in nodes(model):
        if isinstance(text, str) and ("/" in text or "\\" in text or text.startswith("~")):
            raise InputError(
                f"the model's configuration holds {text!r}: a model that needs a file of this "
                "machine, or another repository, cannot be published"
            )
    for key in ("augment", "download"):  # which nobody else needs
        data.pop(key, None)
    groups = {key: data.pop(key) for key in ("classes", "rest") if key in data}
    versions = {name: version(name) for name in LIBRARIES if name in sys.modules}
    return {
        **description,
        "model": model,
        "data": _without_texts(data) | groups,
        "versions": {"seg_torch": __version__, **versions},
    }


def _without_texts(node: Any) -> Any:
    """Return settings without texts, which may name files; `root` and `name` become missing."""
    if not isinstance(node, dict):
        return node
    kept = {}
    for key, value in node.items():
        items = value if isinstance(value, list | tuple) else [value]
        if key in PUBLIC_TEXTS or not any(isinstance(item, str) for item in items):
            kept[key] = _without_texts(value)
        elif key in ("root", "name"):
            kept[key] = MISSING
        else:
            log.info("not published, since it may name files: data setting %s=%s", key, value)
    return kept


def _read_scores(path: Path) -> dict[str, Any]:
    try:
        scores = json.loads(path.read_text(encoding="utf-8"))
        return {**scores, "per_class": dict(scores["per_class"])}
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: not the scores that evaluate.py writes: {error}") from None


def _write_json(path: Path, content: dict[str, Any]) -> None:
    # Names of classes are for people to read, in whatever alphabet.
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False))


# The model card


def _card(
    name: str,
    description: dict[str, Any],
    labels: Labels,
    scores: dict[str, Any] | None,
    example: bool,
    license: str | None,
) -> str:
    """Return README.md."""
    architecture = _last_name(description["model"])
    dataset = _last_name(description["data"].get("dataset", {}))
    shown = {key: scores[key] for key in SHOWN if scores and scores.get(key) is not None}
    data = ModelCardData(
        license=license,
        library_name=KEY,
        pipeline_tag="image-segmentation",
        tags=["semantic-segmentation", "pytorch", architecture],
        model_name=name,
        eval_results=_results(dataset, scores or {}, shown) or None,
    )
    iou = None
    if scores is not None:
        iou = [scores["per_class"].get(label, {}).get("iou") for label in labels.names]
    return render(
        "card.md",
        head=data.to_yaml(),
        name=name,
        path=f"{HUB_SCHEME}{name}" if "/" in name else name,
        architecture=architecture,
        channels=len(description["preprocessing"]["mean"]),
        seen=in_words(description["preprocessing"]["resize"]),
        labels=labels,
        example=EXAMPLE if example else None,
        colours=COLOURS,
        dataset=dataset,
        scored_on=_scored_on(scores or {}),
        scores={SHOWN[key]: value for key, value in shown.items()},
        iou=iou,
        repository=REPOSITORY,
    )


def _results(dataset: str, scores: dict[str, Any], shown: dict[str, Any]) -> list[EvalResult]:
    """Return scores as the Hub shows them beside a model."""
    return [
        EvalResult(
            task_type="image-segmentation",
            dataset_type=dataset,
            dataset_name=dataset,
            metric_type=key,
            metric_name=SHOWN[key],
            metric_value=value,
            dataset_split=scores.get("split", "test"),
        )
        for key, value in shown.items()
    ]


def _scored_on(scores: dict[str, Any]) -> str:
    """Return of which images scores are. Earlier versions did not say."""
    scored, of_split = (scores.get(key) for key in ("images", "images_of_split"))
    part = "" if scored == of_split else f"{scored} of the {of_split} "
    if scores.get("split") == "val":
        return f"{part}validation images, which chose the best epoch,"
    return f"{part}test images"


def _last_name(config: dict[str, Any]) -> str:
    return str(config.get("_target_", "unknown")).split(".")[-1]
