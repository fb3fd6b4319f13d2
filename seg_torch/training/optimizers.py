"""Parameter groups: learning rates and weight decay by part of the network."""

import inspect
from collections import defaultdict
from collections.abc import Callable
from typing import Any, cast

from timm.models import group_parameters
from torch import nn
from torch.optim import Optimizer

from seg_torch.errors import InputError, reason

# Settings of `optimizer` in the configuration that are not the optimizer's own.
PARTS = ("encoder_lr", "aux_lr", "layer_decay", "decay_norms")
# Where the models of this package, of segmentation_models_pytorch and of transformers have theirs.
ENCODERS = (
    *("encoder", "backbone", "model.encoder", "model.backbone"),
    "model.model.pixel_level_module.encoder",
)
# timm's groups know of some of these, not of all.
TOKENS = ("cls_token", "dist_token", "reg_token", "mask_token")


def parameter_groups(
    model: nn.Module,
    lr: float,
    encoder_lr: float = 1.0,
    aux_lr: float = 1.0,
    layer_decay: float = 1.0,
    decay_norms: bool = True,
) -> list[dict[str, Any]]:
    """Return each trainable parameter of a model in one group, for an optimizer.

    Args:
        model: A segmentation model.
        lr: The optimizer's learning rate, which the factors multiply.
        encoder_lr: Factor for the encoder.
        aux_lr: Factor for the auxiliary head, `aux_classifier`.
        layer_decay: Factor from each layer of the encoder to the one before it; the last layer has
            it once, against the head. Source: Bao et al., BEiT (2022), appendix; the layers are
            those of timm's `group_matcher`.
        decay_norms: Let weight decay also act on norms, biases and what a timm model names in
            `no_weight_decay()`, such as position embeddings.

    Returns:
        `params` with, where they are not the optimizer's own, `lr` and `weight_decay`; first those
        of the optimizer's rate. A single group, in the model's order, if nothing is told apart.

    Raises:
        InputError: There is no encoder, or it has no layers that timm tells apart.
    """
    encoder, layers = "", {}
    if encoder_lr != 1 or layer_decay != 1:
        encoder = encoder_of(model)
    if layer_decay != 1:
        layers = encoder_layers(model.get_submodule(encoder))
    undecayed = set()
    for path, module in () if decay_norms else model.named_modules():
        names = module.no_weight_decay() if hasattr(module, "no_weight_decay") else ()
        undecayed |= {f"{path}.{name}".lstrip(".") for name in names}

    groups: dict[tuple[float, bool], list[nn.Parameter]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        factor = aux_lr if name.startswith("aux_classifier.") else 1.0
        if encoder and name.startswith(f"{encoder}."):
            factor = encoder_lr
            if layers:
                layer = layers[name.removeprefix(f"{encoder}.")]
                factor *= layer_decay ** (max(layers.values()) + 1 - layer)
        decayed = decay_norms or (parameter.ndim > 1 and name not in undecayed)
        groups[factor, decayed].append(parameter)
    return [
        {"params": parameters}
        | ({} if factor == 1 else {"lr": lr * factor})
        | ({} if decayed else {"weight_decay": 0.0})
        for (factor, decayed), parameters in sorted(groups.items(), key=lambda g: g[0][0] != 1)
    ]


def build_optimizer(
    function: Callable[..., Optimizer], groups: list[dict[str, Any]], options: dict[str, Any]
) -> Optimizer:
    """Build an optimizer.

    Args:
        function: PyTorch's class, or another function of (groups, ...).
        groups: From `parameter_groups`.
        options: Its settings.

    Raises:
        InputError: It refuses its settings.
    """
    try:
        return function(groups, **options)
    except Exception as error:  # of any type: PyTorch looks at few of them itself
        given = " ".join(f"{name}={value}" for name, value in options.items())
        raise InputError(
            f"optimizer: {getattr(function, '__name__', function)} refuses {given}: "
            f"{reason(error)} (its settings: {', '.join(arguments(function))})"
        ) from error


def arguments(function: Callable[..., Any]) -> list[str]:
    """Return the names of the arguments of a function, or a partial, after the first."""
    return list(inspect.signature(getattr(function, "func", function)).parameters)[1:]


def encoder_of(model: nn.Module) -> str:
    """Return the path of a model's pretrained part.

    Raises:
        InputError: It has none that is known.
    """
    modules = dict(model.named_modules())
    library_model = getattr(model, "model", None)  # of transformers: all but the head
    base = f"model.{getattr(library_model, 'base_model_prefix', '')}"
    for path in (*ENCODERS, base):
        if path in modules:
            return path
    raise InputError(
        f"optimizer.encoder_lr and layer_decay: {type(model).__name__} has no part called encoder "
        "or backbone; leave both at 1"
    )


def encoder_layers(encoder: nn.Module) -> dict[str, int]:
    """Return the layer of each parameter of a timm model: 0 for the embedding, then the blocks.

    Raises:
        InputError: It is not a model whose layers timm can tell apart.
    """
    if not hasattr(encoder, "group_matcher"):
        raise InputError(
            "optimizer.layer_decay needs an encoder whose layers timm tells apart, such as one of "
            "model=vit; leave it at 1"
        )
    matcher = cast(Any, encoder).group_matcher(coarse=False)
    layers = group_parameters(encoder, matcher, reverse=True)
    return layers | {name: 0 for name in layers if name in TOKENS}
