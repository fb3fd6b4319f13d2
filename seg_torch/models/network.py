"""The one place where images become what a model expects, and what several processes need of it."""

import copy
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from seg_torch.errors import InputError
from seg_torch.models import cpu

log = logging.getLogger(__name__)

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

PROBE_SIZE = 64  # side of the image with which a model is tried, unless it has an `image_size`

# PyTorch's modes by the values of `trainer.compile`. CUDA graphs, which max-autotune would record,
# keep gradients in memory that the next step writes to, and addresses, which FSDP changes.
COMPILE_MODES = {"default": "default", "max-autotune": "max-autotune-no-cudagraphs"}


class Network(nn.Module):
    """A model with its preprocessing, so that training, evaluation and prediction cannot disagree.

    Args:
        model: Float [N, C, H, W] -> {"out": logits [N, K, h, w], "aux": ...} or the logits alone.
        mean: Of the C channels of the model's input, for images scaled to [0, 1]; by default what
            the model says its weights were trained with (`model.mean`), else ImageNet's.
        std: Standard deviations of the channels.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        model: nn.Module,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        mean = getattr(model, "mean", IMAGENET_MEAN) if mean is None else mean
        std = getattr(model, "std", IMAGENET_STD) if std is None else std
        self.compiled: Callable[[nn.Module, Tensor], Any] | None = None
        self.compiled_shape: torch.Size | None = None
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(-1, 1, 1))
        _size_lazy_layers(model, len(mean))
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.ndim == 4:  # convolutions: faster on CPU and GPU alike
                tensor.data = tensor.data.to(memory_format=torch.channels_last)

    def forward(self, images: Tensor, target: Tensor | None = None) -> dict[str, Tensor]:
        """Compute logits, or the model's own loss.

        Args:
            images: Uint8 [N, C, H, W], or of any type with values from 0 to 255.
            target: Integer [N, H, W], class ids or `IGNORE_INDEX`. Only for a model with a loss of
                its own (`model.has_own_loss`), which takes it after the images.

        Returns:
            `out`, and in training `aux` if the model has an auxiliary head: logits [N, K, h, w] at
            the resolution at which the head works. With a target `loss` alone, a scalar.

        Raises:
            InputError: The model answers with something else.
        """
        x = images.to(self.mean.dtype).div(255).sub(self.mean).div(self.std)
        x = x.contiguous(memory_format=torch.channels_last)
        inputs = (x,) if target is None else (x, target)
        run: Callable[..., Any] = _apply
        if self.training and self.compiled is not None and target is None:
            self.compiled_shape = self.compiled_shape or x.shape
            run = self.compiled if x.shape == self.compiled_shape else _apply
        with cpu.fast_gradients(x.device):
            out = run(self.model, *inputs)
        outputs = {"out": out} if isinstance(out, Tensor) else out
        key, ndim = ("out", 4) if target is None else ("loss", 0)
        answer = outputs.get(key) if isinstance(outputs, dict) else None
        if not isinstance(answer, Tensor) or answer.ndim != ndim:
            raise InputError(
                f"the model {type(self.model).__name__} answers with {_named(out)}; its forward "
                'has to return logits [N, classes, h, w] or {"out": logits}'
            )
        return outputs

    def compile_for_training(self, mode: str) -> None:
        """Let the first batch that is trained on compile the model, for batches of its shape.

        Batches of another shape, evaluation, and a loss of the model's own run it as it is. So does
        a copy of it.

        Args:
            mode: One of `COMPILE_MODES`.

        Raises:
            InputError: No such mode, or PyTorch cannot compile here. (Whether it can compile this
                model shows in the first step, see `named_compile_errors`.)
        """
        try:
            # Not a module around the model: parameters keep their names.
            self.compiled = torch.compile(_apply, mode=COMPILE_MODES[mode], dynamic=False)
        except RuntimeError as error:
            raise InputError(
                f"trainer.compile={mode}: {error}; set trainer.compile=null"
            ) from error
        log.info("the model is compiled in the first step, which takes minutes")


def _apply(model: nn.Module, *inputs: Tensor) -> Any:
    return model(*inputs)


@contextmanager
def named_compile_errors() -> Iterator[None]:
    """Return the context of training a network that is compiled.

    Raises:
        InputError: PyTorch cannot compile the model, or has no compiler.
    """
    try:
        yield
    except RuntimeError as error:
        dynamo = sys.modules.get("torch._dynamo.exc")  # importing it takes a second
        if dynamo is None or not isinstance(error, dynamo.TorchDynamoException):
            raise
        reason = " ".join(str(error).split("\n\n")[0].split())
        raise InputError(
            f"trainer.compile: PyTorch cannot compile this model here: {reason}. Set "
            "trainer.compile=null"
        ) from error


def _named(answer: Any) -> str:
    """Return what a model answered with, for a message."""
    if isinstance(answer, Tensor):
        return f"a tensor of shape {list(answer.shape)}"
    if isinstance(answer, dict):
        shapes = {k: list(v.shape) if isinstance(v, Tensor) else v for k, v in answer.items()}
        return f"a {type(answer).__name__} of {', '.join(f'{k} {v}' for k, v in shapes.items())}"
    return f"a {type(answer).__name__}"


def _size_lazy_layers(model: nn.Module, channels: int) -> None:
    """Let one image give their sizes to the layers that take them from their first input.

    Raises:
        InputError: The model takes no such image.
    """
    if not any(is_lazy(tensor) for tensor in (*model.parameters(), *model.buffers())):
        return
    size = getattr(model, "image_size", PROBE_SIZE)
    try:
        with torch.no_grad(), _in_evaluation_mode(model), torch.random.fork_rng(devices=[]):
            model(torch.zeros(1, channels, size, size))
    except Exception as error:  # whatever a model raises that takes no images of this size
        raise InputError(
            f"the model {type(model).__name__} has lazy layers, which get their sizes from an "
            f"image of {size} x {size} pixels, and fails there: {error}"
        ) from error


@contextmanager
def _in_evaluation_mode(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def check_outputs(network: Network, classes: int) -> None:
    """Refuse a model that does not give logits of so many classes.

    One that takes no image of the size that is tried here is left alone.

    Raises:
        InputError: It gives something else, see `Network.forward`.
    """
    size = getattr(network.model, "image_size", PROBE_SIZE)
    images = torch.zeros(1, len(network.mean), size, size, dtype=torch.uint8)
    try:
        with torch.no_grad(), _in_evaluation_mode(network), torch.random.fork_rng(devices=[]):
            outputs = network(images.to(network.mean.device))["out"].shape[1]
    except InputError:
        raise
    except Exception as error:  # whatever it is, it is not about the outputs
        log.debug("the outputs of the model could not be looked at: %s", error)
        return
    if outputs != classes:
        raise InputError(
            f"the model {type(network.model).__name__} gives logits of {outputs} classes for data "
            f"of {classes} classes; build it for {classes}"
        )


def check_channels(network: Network, channels: int) -> None:
    """Refuse a model that does not take images of so many channels.

    Raises:
        InputError: There are not as many means, or the model fails.
    """
    if len(network.mean) != channels or len(network.std) != channels:
        raise InputError(
            f"preprocessing.mean and std have {len(network.mean)} and {len(network.std)} numbers "
            f"for the {channels} channels of the images"
        )
    if channels == 3:
        return
    size = getattr(network.model, "image_size", PROBE_SIZE)
    try:
        with torch.no_grad(), _in_evaluation_mode(network):
            network(torch.zeros(1, channels, size, size, dtype=torch.uint8))
    except Exception as error:
        raise InputError(f"this model takes no images of {channels} channels: {error}") from error


def freeze_unused_parameters(network: Network) -> list[str]:
    """Freeze the parameters on which no output of training depends.

    DistributedDataParallel would wait for their gradients for ever. Libraries leave such layers in
    a model where it does not use all of its encoder.

    Args:
        network: Its modes, statistics and the state of the random generator stay as they are.

    Returns:
        Names of the parameters that were frozen by this call.

    Raises:
        InputError: The model answers with something else than `Network.forward` expects.
    """
    for device in ("meta", "cpu"):  # meta computes shapes alone, but not for every operation
        try:
            unused = _unused_parameters(network, device)
            break
        except InputError:
            raise
        except Exception as error:  # whatever a model raises that takes no images of this size
            reason = error
    else:
        log.warning("cannot tell which parameters the model does not use: %s", reason)
        return []
    for name in unused:
        network.get_parameter(name).requires_grad_(False)
    if unused:
        log.info("frozen, since no output depends on them: %s", ", ".join(unused))
    return unused


def _unused_parameters(network: Network, device: str) -> list[str]:
    probe = copy.deepcopy(network).to(device).train()
    parameters = {name: p for name, p in probe.named_parameters() if p.requires_grad}
    size = getattr(network.model, "image_size", PROBE_SIZE)
    images = torch.zeros(2, len(network.mean), size, size, dtype=torch.uint8, device=device)
    with torch.random.fork_rng(devices=[]):
        outputs = probe(images)
        total = sum(outputs[key].float().sum() for key in ("out", "aux") if key in outputs)
        gradients = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)
    return [name for name, g in zip(parameters, gradients, strict=True) if g is None]
