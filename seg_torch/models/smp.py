"""Any architecture of segmentation_models_pytorch, which is an extra."""

import difflib
import json
import logging
from collections.abc import Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

import timm
from torch import Tensor, nn

from seg_torch.errors import InputError, check_choice, reason, require
from seg_torch.models import weights as pretrained
from seg_torch.models.base import image_statistics, pad_to_multiple
from seg_torch.models.network import IMAGENET_MEAN, IMAGENET_STD

log = logging.getLogger(__name__)


class SMP(nn.Module):
    """A model of segmentation_models_pytorch for images of every size.

    Args:
        model: Float [N, 3, H, W] -> logits [N, K, H, W], for some sizes.
        multiple: Of what H and W must be.

    Attributes:
        mean: Channel means of the images that the encoder was trained with, scaled to [0, 1].
        std: Their standard deviations.
    """

    def __init__(self, model: nn.Module, multiple: int) -> None:
        super().__init__()
        self.model: Any = model
        self.multiple = multiple
        self.mean: Sequence[float] = IMAGENET_MEAN
        self.std: Sequence[float] = IMAGENET_STD

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Compute logits.

        Args:
            x: Float [N, 3, H, W].

        Returns:
            `out`: float [N, K, H, W].

        Raises:
            InputError: In training, N is 1, and the architecture normalises pooled features.
        """
        height, width = x.shape[-2:]
        try:
            logits = self.model(pad_to_multiple(x, self.multiple))
        except ValueError as error:
            if len(x) == 1 and self.training:
                raise InputError(
                    f"{type(self.model).__name__} cannot train on a batch of one image ({error}); "
                    "use data.batch_size=2 or more"
                ) from error
            raise
        return {"out": logits[..., :height, :width]}


def published_smp(config: dict[str, Any], weights: Path) -> SMP:
    """Build a model of segmentation_models_pytorch that its `save_pretrained` wrote.

    Args:
        config: What its config.json says. Its `activation`, and a classifier of whole images beside
            the segmentation, are left out.
        weights: A `.safetensors` file.

    Raises:
        InputError: As for `smp`; weights that do not fit; images of other than three channels; or
            one class, which is told from the background by a threshold.
    """
    options = dict(config)
    if options.get("in_channels", 3) != 3 or not isinstance(options.get("classes"), int):
        raise InputError("its config.json is not of a model for RGB images and some classes")
    if options["classes"] < 2:
        raise InputError("it has one class, told by a threshold; two or more are needed")
    left_out = ("_model_class", "encoder_name", "encoder_weights", "classes", "in_channels")
    architecture, encoder, _, num_classes, _ = (options.pop(key, None) for key in left_out)
    options.update(activation=None, aux_params=None)
    model = _library_model(str(architecture), str(encoder), num_classes, options)
    state = pretrained.read_state_dict(weights)
    state = {k: v for k, v in state.items() if not k.startswith("classification_head.")}
    try:
        model.model.load_state_dict(state)
    except RuntimeError as error:
        raise InputError(f"{weights} does not fit its own config.json: {reason(error)}") from error
    return model


def smp(
    num_classes: int,
    architecture: str = "Unet",
    encoder: str = "resnet34",
    weights: str | Path | None = "imagenet",
) -> SMP:
    """Build a model of segmentation_models_pytorch.

    Args:
        num_classes: Number of classes K.
        architecture: `Unet`, `UnetPlusPlus`, `MAnet`, `Linknet`, `FPN`, `PSPNet`, `DeepLabV3`,
            `DeepLabV3Plus`, `PAN`, `UPerNet`, `Segformer` or, with a ViT of timm, `DPT`.
        encoder: Name of an encoder of the library, or `tu-` and the name of a timm model.
        weights: Of the encoder: `imagenet` or another name that the library has for it, the path of
            a state dict (for `tu-` of the timm model), or `None` for random ones.

    Returns:
        Module: float [N, 3, H, W] -> {"out": logits [N, K, H, W]}.

    Raises:
        InputError: segmentation_models_pytorch is not installed; unknown architecture or encoder,
            or two that do not fit; weights that cannot be loaded or do not fit.
    """
    # Unless told otherwise, DPT's Vision Transformers take one size and keep their classifier.
    is_dpt = architecture == "DPT"
    options: dict[str, Any] = {"dynamic_img_size": True, "num_classes": 0} if is_dpt else {}
    model = _library_model(architecture, encoder, num_classes, options)
    if weights is None:
        return model
    if not encoder.startswith("tu-"):
        _load_encoder(model, encoder, weights)
        return model
    options = {"num_classes": 0} if is_dpt else {"features_only": True}
    timm_encoder = pretrained.timm_model(encoder.removeprefix("tu-"), weights, **options)
    model.mean, model.std = image_statistics(timm_encoder)
    state = timm_encoder.state_dict()  # may have stages that the library cuts off
    inner = model.model.encoder.model
    inner.load_state_dict({name: state[name] for name in inner.state_dict()})
    return model


def _library_model(
    architecture: str, encoder: str, num_classes: int, options: dict[str, Any]
) -> SMP:
    """Make a model of the library with random weights; `options` are those of its constructor."""
    require("model=smp", "smp", "segmentation_models_pytorch")
    import segmentation_models_pytorch as library

    architectures = [cls.__name__ for cls in library.MODEL_ARCHITECTURES_MAPPING.values()]
    check_choice("model.architecture", architecture, architectures)
    encoders = library.encoders.get_encoder_names()
    # Of timm, an architecture that it has: other names would be looked up on the Hub.
    of_timm = encoder.startswith("tu-") and timm.is_model(encoder[3:].split(".")[0])
    if encoder not in encoders and not of_timm:
        nearest = difflib.get_close_matches(encoder, encoders, n=3)
        raise InputError(
            f"model.encoder is {encoder!r}, which segmentation_models_pytorch does not have; use "
            f"{', '.join([*nearest, 'tu-NAME'])} with the name of a timm model"
        )
    try:
        library_model = library.create_model(
            architecture, encoder, encoder_weights=None, classes=num_classes, **options
        )
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"cannot make {architecture} with {encoder}: {reason(error)}") from error
    # These two halve their encoder's features of stride 16 three times more, and once more.
    multiple = {"PAN": 128, "DPT": 32}.get(architecture, library_model.encoder.output_stride)
    return SMP(library_model, multiple)


def _load_encoder(model: SMP, encoder: str, weights: str | Path) -> None:
    """Load weights that the library publishes for one of its encoders, or those of a file."""
    import segmentation_models_pytorch as library

    published = library.encoders.encoders[encoder]["pretrained_settings"]
    if str(weights) in published:
        # Asked for here, since the library asks for a minute when there is no network.
        repository, revision = itemgetter("repo_id", "revision")(published[str(weights)])
        file = pretrained.download_from_hugging_face(repository, "model.safetensors", revision)
        settings = pretrained.download_from_hugging_face(repository, "config.json", revision)
        model.mean, model.std = itemgetter("mean", "std")(json.loads(settings.read_bytes()))
    else:
        file = pretrained.weights_file(weights, published)
    try:
        model.model.encoder.load_state_dict(pretrained.read_state_dict(file))
    except RuntimeError as error:
        raise InputError(f"{file} does not fit the encoder {encoder}: {reason(error)}") from error
    log.info("loaded the weights of the encoder %s from %s", encoder, file)
