"""Any semantic segmentation model of Hugging Face's transformers, which is an extra."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from seg_torch.errors import InputError, check_choice
from seg_torch.models.network import IMAGENET_MEAN, IMAGENET_STD
from seg_torch.models.weights import download_from_hugging_face, log_loading


class TransformersModel(nn.Module):
    """A semantic segmentation model of transformers, with logits of the size that it gives them.

    Args:
        model: A `...ForSemanticSegmentation`.

    Attributes:
        mean: Channel means of the images that the model was trained with, scaled to [0, 1].
        std: Their standard deviations.
        image_size: Height and width of images that the model can take; some take no others.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model.train()  # from_pretrained leaves it in evaluation mode
        size = getattr(model.config, "image_size", None)
        self.image_size = size if isinstance(size, int) else 64
        self.mean: Sequence[float] = IMAGENET_MEAN
        self.std: Sequence[float] = IMAGENET_STD

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Compute logits.

        Args:
            x: Float [N, 3, H, W].

        Returns:
            `out`: float [N, K, h, w].
        """
        return {"out": self.model(pixel_values=x).logits}


def transformers(
    num_classes: int, config: dict[str, Any], weights: str | Path | None = None
) -> TransformersModel:
    """Build a semantic segmentation model of transformers.

    The configuration alone describes the architecture, so that a checkpoint which holds it can be
    loaded without a network. No code from the Hub is run.

    Args:
        num_classes: Number of classes K.
        config: `model_type`, such as `segformer`, `upernet`, `dpt`, `beit` or `mobilevit`, and
            whatever of the model's `config.json` differs from the defaults of that type.
        weights: Repository on the Hub, such as `nvidia/segformer-b0-finetuned-ade-512-512` or, with
            an encoder alone, `nvidia/mit-b0`; or a folder that `save_pretrained` wrote; or `None`
            for random ones. The encoder must fit. Layers of the head that do not, such as those for
            other classes, are new, and the skipped keys are logged.

    Returns:
        Module: float [N, 3, H, W] -> {"out": logits [N, K, h, w]}, of a quarter of H and W for
        SegFormer.

    Raises:
        InputError: transformers is not installed; no or an unsuitable configuration; weights that
            cannot be loaded or do not fit.
    """
    try:
        from huggingface_hub.errors import StrictDataclassError
        from transformers import AutoConfig, AutoModelForSemanticSegmentation
        from transformers import logging as library_logging
        from transformers.models.auto.modeling_auto import (
            MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES as MODEL_NAMES,
        )
    except ImportError as error:
        raise InputError(
            f"this model needs transformers ({error}); install it with pip install transformers"
        ) from error

    check_choice("model.config.model_type", config.get("model_type"), MODEL_NAMES)
    # These can name files, or weights and code on the Hub, and the configuration may come from
    # anybody's checkpoint.
    found = re.search(r"\w*attn_implementation|'backbone': [^N]|[/\\]", str(config))
    if found:
        raise InputError(
            f"model.config holds {found[0]}: it must not choose an attn_implementation or name "
            "files, repositories of the Hub or a pretrained backbone; give backbone_config"
        )
    try:
        model_config = AutoConfig.for_model(**config)
        model_config.num_labels = num_classes
        model_config.use_auxiliary_head = False  # its logits would not come out
        if weights is None:
            return TransformersModel(AutoModelForSemanticSegmentation.from_config(model_config))
    except (TypeError, ValueError, StrictDataclassError) as error:
        raise InputError(f"model.config: {error}") from error

    settings = _image_settings(weights)
    library_logging.set_verbosity_error()  # its report is what is logged here, as a long table
    result = TransformersModel(_pretrained(AutoModelForSemanticSegmentation, model_config, weights))
    if settings.get("do_normalize", True):
        result.mean = settings.get("image_mean", IMAGENET_MEAN)
        result.std = settings.get("image_std", IMAGENET_STD)
    else:
        result.mean, result.std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    return result


def _pretrained(auto_model: Any, model_config: Any, weights: str | Path) -> nn.Module:
    """Load published weights; the encoder must fit, the head need not."""
    try:
        model, loaded = auto_model.from_pretrained(
            weights,
            config=model_config,
            dtype=torch.float32,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            trust_remote_code=False,
        )
    except Exception as error:  # whatever the library makes of a broken file
        raise InputError(f"cannot load {weights}: {error}") from error
    other_shape = {name for name, *_ in loaded["mismatched_keys"]}
    new = sorted(other_shape | set(loaded["missing_keys"]))
    encoder = f"{model.base_model_prefix or 'backbone'}."
    lacking = [name for name in new if name.startswith(encoder)]
    if lacking:
        raise InputError(
            f"{weights} does not fit model.config: {len(lacking)} tensors of the encoder are "
            f"absent or of another shape, such as {', '.join(lacking[:3])}; give model.config the "
            "values of its config.json"
        )
    skipped = sorted(other_shape | set(loaded["unexpected_keys"]))
    log_loading(str(weights), len(model.state_dict()), new, skipped)
    return model


def _image_settings(weights: str | Path) -> dict[str, Any]:
    """What the weights were trained with, from the file beside them."""
    name = "preprocessor_config.json"
    if Path(weights).is_dir():
        file = Path(weights) / name
        return json.loads(file.read_text()) if file.is_file() else {}
    try:
        # First of all, since the library asks for a minute and a half when there is no network.
        return json.loads(download_from_hugging_face(str(weights), name).read_text())
    except (InputError, ValueError) as error:
        raise InputError(
            f"cannot load {weights}, neither as a folder nor from the Hugging Face Hub "
            f"({error.__cause__ or error}); download the repository by other means and give "
            "model.weights=FOLDER, or start from random weights with model.weights=null"
        ) from error
