"""Semantic segmentation models of Hugging Face's transformers, which is an extra.

Any that gives logits of classes, and those that classify masks.
"""

import json
import math
import re
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn

from seg_torch.errors import InputError, check_choice, require
from seg_torch.labels import IGNORE_INDEX
from seg_torch.models.base import pad_to_multiple, without_padding
from seg_torch.models.masks import MaskLoss, semantic_logits
from seg_torch.models.network import IMAGENET_MEAN, IMAGENET_STD
from seg_torch.models.weights import download_from_hugging_face, log_loading

MASK_MODELS = ("eomt", "eomt_dinov3", "mask2former", "maskformer", "oneformer")
# Those that resize maps of the strides 4 to 32 to one size, which others than multiples of 32 would
# squeeze into each other.
PADDED = ("segformer", "upernet")
# "the task is semantic" for OneFormer, in the tokens of CLIP, between those of start and end.
SEMANTIC_TASK = (49406, 518, 10549, 533, 29119, 1550, 49407)


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
        self.model: Any = model.train()  # from_pretrained leaves it in evaluation mode
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
        if self.model.config.model_type not in PADDED:
            return {"out": self.model(pixel_values=x).logits}
        size, x = x.shape[-2:], pad_to_multiple(x, 32)
        logits = self.model(pixel_values=x).logits
        return {"out": without_padding(logits, size, x.shape[-1] // logits.shape[-1])}


class MaskClassificationModel(TransformersModel):
    """A model of transformers that proposes masks and their classes, for images of every size.

    Args:
        model: A Mask2Former, MaskFormer, OneFormer or EoMT.
    """

    has_own_loss = True

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        config = self.model.config
        self.image_size = 64  # EoMT's takes others, too
        self.model.criterion = MaskLoss(self.model.criterion)
        self.is_eomt = config.model_type.startswith("eomt")
        self.multiple = config.patch_size if self.is_eomt else 32
        if config.model_type == "eomt":
            self.model.embeddings.position_embeddings.register_forward_hook(self._fit_positions)
        if config.model_type == "oneformer":
            task = torch.zeros(1, config.task_seq_len, dtype=torch.long)
            task[0, : len(SEMANTIC_TASK)] = torch.tensor(SEMANTIC_TASK)
            self.register_buffer("task", task, persistent=False)

    def forward(self, x: Tensor, target: Tensor | None = None) -> dict[str, Tensor]:
        """Compute logits, or the loss.

        Args:
            x: Float [N, 3, H, W].
            target: Integer [N, H, W], class ids or `IGNORE_INDEX`.

        Returns:
            `out`: float32 [N, K, h, w], see `seg_torch.models.masks.semantic_logits`. With a target
            `loss` alone, a float32 scalar, see `seg_torch.models.masks.MaskLoss`.
        """
        height, width = x.shape[-2:]
        x = pad_to_multiple(x, self.multiple)
        options: dict[str, Any] = {}
        if self.is_eomt:
            self.model.grid_size = tuple(side // self.multiple for side in x.shape[-2:])
        else:
            options["output_hidden_states"] = True  # MaskFormer's auxiliary loss fails without
        if self.model.config.model_type == "oneformer":
            options["task_inputs"] = self.get_buffer("task").expand(len(x), -1)
        if target is not None:
            padding = (0, x.shape[-1] - width, 0, x.shape[-2] - height)
            target = F.pad(target, padding, value=IGNORE_INDEX)
            # They are passed on to the criterion, which is ours.
            options |= {"mask_labels": target, "class_labels": target}
            return {"loss": self.model(pixel_values=x, **options).loss}
        result = self.model(pixel_values=x, **options)
        logits = semantic_logits(result.class_queries_logits, result.masks_queries_logits)
        if self.is_eomt:  # whose stride need not be a whole number
            cells = 2**self.model.config.num_upscale_blocks
            return {"out": without_padding(logits, (height, width), self.multiple, cells)}
        stride = x.shape[-1] // logits.shape[-1]
        return {"out": without_padding(logits, (height, width), stride)}

    def _fit_positions(self, module: nn.Module, inputs: Any, positions: Tensor) -> Tensor:
        """Resize the position embeddings [1, S * S, D] of EoMT to the grid of the image."""
        side = math.isqrt(positions.shape[1])
        grid = self.model.grid_size
        if grid == (side, side):
            return positions
        square = positions.unflatten(1, (side, side)).permute(0, 3, 1, 2)
        resized = F.interpolate(square, size=grid, mode="bilinear", align_corners=False)
        return resized.flatten(2).transpose(1, 2)


def transformers(
    num_classes: int,
    config: dict[str, Any],
    weights: str | Path | None = None,
    complete: bool = False,
) -> TransformersModel:
    """Build a semantic segmentation model of transformers.

    The configuration alone describes the architecture, so that a checkpoint which holds it can be
    loaded without a network. No code from the Hub is run.

    Args:
        num_classes: Number of classes K.
        config: `model_type`, such as `segformer`, `upernet`, `dpt`, `beit` or `mobilevit`, or, of
            those that classify masks, `mask2former`, `maskformer`, `oneformer` or `eomt`; and
            whatever of the model's `config.json` differs from the defaults of that type.
        weights: Repository on the Hub, such as `nvidia/segformer-b0-finetuned-ade-512-512` or, with
            an encoder alone, `nvidia/mit-b0`; or a folder that `save_pretrained` wrote; or `None`
            for random ones. The encoder must fit. Layers of the head that do not, such as those for
            other classes, are new, and the skipped keys are logged.
        complete: Layers of the head have to fit, too.

    Returns:
        Module: float [N, 3, H, W] -> {"out": logits [N, K, h, w]}, of a quarter of H and W for
        SegFormer and for those that classify masks. The latter have a loss of their own; that of
        OneFormer is without the contrast to texts.

    Raises:
        InputError: transformers is not installed; no or an unsuitable configuration; weights that
            cannot be loaded or do not fit.
    """
    require("this model", "transformers", "transformers")
    import transformers as library

    wrap: type[TransformersModel] = TransformersModel
    auto_model: Any = library.AutoModelForSemanticSegmentation
    if config.get("model_type") in MASK_MODELS:
        wrap, auto_model = MaskClassificationModel, library.AutoModelForUniversalSegmentation
    try:
        model_config = _model_config(config, num_classes)
        if weights is None:
            return wrap(auto_model.from_config(model_config))
    except (ImportError, TypeError, ValueError, StrictDataclassError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"model.config: {error}") from error
    settings = _image_settings(weights)
    result = wrap(_pretrained(auto_model, model_config, weights, complete))
    result.mean, result.std = _statistics(settings)
    if settings.get("do_flip_channel_order"):  # the weights are for images in BGR
        first = next(m for m in result.modules() if isinstance(m, nn.Conv2d))
        first.weight.data = first.weight.data.flip(1)
        result.mean, result.std = result.mean[::-1], result.std[::-1]
    return result


def _model_config(config: dict[str, Any], num_classes: int) -> Any:
    """Return the library's configuration of a model.

    Raises:
        Exception: Of many types; an InputError for what a stranger's must not say.
    """
    from transformers import AutoConfig
    from transformers.models.auto import modeling_auto

    kinds = [*modeling_auto.MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES, *MASK_MODELS]
    check_choice("model.config.model_type", config.get("model_type"), kinds)
    # These can name files, or weights and code on the Hub, and the configuration may come from
    # anybody's checkpoint.
    harmful = re.search(r"\w*attn_implementation|'backbone': [^N]|[/\\]", str(config))
    if harmful:
        raise InputError(
            f"model.config holds {harmful[0]}: it must not choose an attn_implementation or name "
            "files, repositories of the Hub or a pretrained backbone; give backbone_config"
        )
    model_config = AutoConfig.for_model(**deepcopy(config))  # 5.17 changes what is inside
    model_config.num_labels = num_classes
    model_config.use_auxiliary_head = False  # its logits would not come out
    model_config.is_training = False  # OneFormer's, for which it needs texts
    return model_config


def _statistics(settings: dict[str, Any]) -> tuple[list[float], list[float]]:
    """Return mean and standard deviation of images scaled to [0, 1], as `Network` wants them."""
    mean: Sequence[float] = [0.0] * 3
    std: Sequence[float] = [1.0] * 3
    # MobileViT alone takes images in BGR, and its are not normalised.
    if settings.get("do_normalize", "do_flip_channel_order" not in settings):
        mean = settings.get("image_mean") or IMAGENET_MEAN
        std = settings.get("image_std") or IMAGENET_STD
    # What they were scaled to, which is [0, 1] but for BEiT's older checkpoints and a few others.
    factor = settings.get("rescale_factor", 1 / 255) if settings.get("do_rescale", True) else 1
    return [m / (255 * factor) for m in mean], [s / (255 * factor) for s in std]


def _pretrained(
    auto_model: Any, model_config: Any, weights: str | Path, complete: bool
) -> nn.Module:
    """Load published weights; the encoder must fit, the head only where asked for."""
    from transformers import logging as library_logging

    library_logging.set_verbosity_error()  # its report is what is logged here, as a long table
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
    if complete and new:
        raise InputError(
            f"{weights} does not segment: {len(new)} tensors are absent or of another shape, such "
            f"as {', '.join(new[:3])}; it may be an encoder alone"
        )
    if model_config.model_type in MASK_MODELS:  # whose encoder is of no use without the decoder
        lacking = [name for name in new if not re.search("class_(predictor|embed)|criterion", name)]
    else:
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
    """Return what the weights were trained with, from the file beside them."""
    name = "preprocessor_config.json"
    if Path(weights).is_dir():
        file = Path(weights) / name
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    try:
        # First of all, since the library asks for a minute and a half when there is no network.
        return json.loads(download_from_hugging_face(str(weights), name).read_bytes())
    except (InputError, ValueError) as error:
        raise InputError(
            f"cannot load {weights}, neither as a folder nor from the Hugging Face Hub "
            f"({error.__cause__ or error}); download the repository by other means and give "
            "model.weights=FOLDER, or start from random weights with model.weights=null"
        ) from error
