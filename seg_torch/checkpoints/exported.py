"""Exported networks: one graph from images to class ids, in a file that describes itself.

The graph takes `images`, uint8 [N, C, H, W] of any N, H and W, and gives `classes`, uint8
[N, H, W], `logits`, float32 [N, K, h, w] at the resolution of the head, which tiles and
augmentation are made of, and, where they were asked for, `probabilities`, float32 [N, K, H, W].
"""

import json
import logging
import os
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seg_torch.checkpoints import checkpoint
from seg_torch.checkpoints.moved import with_current_names
from seg_torch.errors import InputError, reason, require
from seg_torch.images.resize import Resize, in_words, seen_size
from seg_torch.labels import Labels
from seg_torch.models.network import Network
from seg_torch.upsample import upsample
from seg_torch.version import __version__

# Of the operators of ONNX: the first with resizing that is anti-aliased.
OPSET = 18
OUTPUTS = ["classes", "logits", "probabilities"]  # of a graph, the last where it was asked for
# Odd, so that every layer that pads or cuts does so while it is traced.
EXAMPLE = (161, 225)

# Images uint8 [N, C, H, W], names of outputs -> these outputs.
GraphRunner = Callable[[Tensor, Sequence[str]], list[Tensor]]


class Graph(nn.Module):
    """All that happens between an image and its class ids.

    Args:
        network: Images to logits.
        resize: At which size the network sees images, see `seg_torch.images.resize.seen_size`.
        probabilities: Return them, too.
    """

    def __init__(self, network: Network, resize: Resize, probabilities: bool = False) -> None:
        super().__init__()
        self.network = network
        self.resize = resize
        self.outputs = OUTPUTS if probabilities else OUTPUTS[:2]

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Compute the `outputs` of images uint8 [N, C, H, W]."""
        seen = images
        if self.resize is not None:  # as `resize_image` does it, which no other runtime has
            size = seen_size(self.resize, *images.shape[-2:])
            seen = F.interpolate(images.float(), size, mode="bilinear", antialias=True).round()
        logits = self.network(seen)["out"].float()
        at_size = upsample(logits, images.shape[-2:])
        classes = at_size.argmax(1).to(torch.uint8)
        if self.outputs == OUTPUTS:
            return classes, logits, at_size.softmax(1)
        return classes, logits


def write(
    graph: Graph,
    path: Path,
    format: str,
    description: dict[str, Any],
    calibration: Sequence[np.ndarray] | None = None,
) -> None:
    """Export a graph.

    Args:
        graph: On the CPU, in evaluation mode.
        path: Of the file; OpenVINO keeps its weights in a second one, with the suffix `.bin`.
        format: One of `FORMATS`.
        description: See `seg_torch.checkpoints.checkpoint.describe`.
        calibration: Images uint8 [1, C, H, W] by which OpenVINO's graph becomes one of integers;
            `None` leaves it in float32.

    Raises:
        InputError: A package is missing, or the model cannot be exported.
    """
    packages = require_packages(format, calibration is not None)
    for name in ("onnxscript", "onnx_ir", "nncf"):  # which tell every step
        logging.getLogger(name).setLevel(logging.WARNING)
    if hasattr(graph.network.model, "has_own_loss"):
        raise InputError(
            "models that classify masks cannot be exported: in transformers they take Python's "
            "numbers from the size of the image (Swin encoders) or branch on values (EoMT)"
        )
    versions = {"seg_torch": __version__, **{name: version(name) for name in ("torch", *packages)}}
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    about = json.dumps({**description, "versions": versions, "exported": now})
    draft = path.with_suffix(".onnx")  # which OpenVINO's file is made of
    try:
        _write_onnx(graph, draft, about)
        if format == "openvino":
            _convert_to_openvino(draft, path, about, calibration)
            draft.unlink()
    except Exception as error:  # there is no end to what the exporters raise
        raise InputError(f"the model cannot be exported to {format}: {_reason(error)}") from error


def require_packages(format: str, int8: bool) -> tuple[str, ...]:
    """Return the packages that it takes to write a format.

    Raises:
        InputError: One is missing.
    """
    packages = (*FORMATS[format].packages, *(["nncf"] if int8 else []))
    require(f"format={format}", format, *packages)
    return packages


def _reason(error: BaseException) -> str:
    """Return the innermost cause, in a line: exporters wrap it in pages of advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {reason(error)}"


def _write_onnx(graph: Graph, path: Path, about: str) -> None:
    images = torch.zeros(2, len(graph.network.mean), *EXAMPLE, dtype=torch.uint8)
    free = torch.export.Dim.DYNAMIC
    shapes = {"images": {0: free, 2: free, 3: free}}
    with torch.no_grad():
        program = torch.export.export(graph, (images,), dynamic_shapes=shapes, strict=False)
    exported: Any = torch.onnx.export(
        program,
        dynamo=True,
        opset_version=OPSET,
        input_names=["images"],
        output_names=graph.outputs,
        verbose=False,
    )
    exported.model.metadata_props[checkpoint.KEY] = about
    exported.save(str(path))


def _convert_to_openvino(
    onnx: Path, path: Path, about: str, calibration: Sequence[np.ndarray] | None
) -> None:
    import openvino

    model = openvino.Core().read_model(onnx)  # keeps the file open
    _antialias(model)
    if calibration is not None:
        os.environ.setdefault("NNCF_CI", "1")  # it would send statistics of its use
        import nncf

        images = nncf.Dataset(calibration)
        model = nncf.quantize(model, images, subset_size=len(calibration))
    model.set_rt_info(about, [checkpoint.KEY])
    openvino.save_model(model, path, compress_to_fp16=False)


def _antialias(model: Any) -> None:
    """Resize in an OpenVINO model as PyTorch does it with `antialias=True`.

    Its reader of ONNX files makes of such a node one that weighs the neighbours in another way.
    """
    from openvino import opset11

    for node in model.get_ops():
        if node.get_type_name() != "Interpolate" or not node.get_attributes()["antialias"]:
            continue
        image, size = node.input_values()[:2]  # [N, C, h, w], and these four of the result
        axes = np.array([2, 3])
        mode = {"cubic": "bicubic_pillow"}.get(node.get_attributes()["mode"], "bilinear_pillow")
        size = opset11.gather(size, axes, np.array(0))
        new = opset11.interpolate(image, size, mode, "sizes", cube_coeff=-0.5, axes=axes)
        node.output(0).replace(new.output(0))


def open_exported(path: str | Path) -> tuple[GraphRunner, dict[str, Any]]:
    """Open an exported network, which runs on the CPU, in float32 but for what is quantised.

    Args:
        path: Of the file, whose name ends with the suffix of its format.

    Returns:
        The network and its description.

    Raises:
        InputError: It cannot be read, or is none of seg_torch's.
    """
    if not os.path.isfile(path):
        raise InputError(f"checkpoint={path}: no such file")
    name, format = next(item for item in FORMATS.items() if str(path).endswith(item[1].suffix))
    require(f"checkpoint={path}", name, format.packages[-1])
    try:
        run, about = format.open(str(path))
        description = json.loads(about)
        checkpoint.check_description(description)
    except Exception as error:  # as of checkpoints
        why = "it does not say what it is" if isinstance(error, KeyError) else _reason(error)
        raise InputError(
            f"checkpoint={path}: not a network that seg_torch has exported: {why}"
        ) from None
    return run, with_current_names(description)


def _open_onnx(path: str) -> tuple[GraphRunner, str]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def run(images: Tensor, outputs: Sequence[str]) -> list[Tensor]:
        return [torch.from_numpy(o) for o in session.run(outputs, {"images": images.numpy()})]

    return run, session.get_modelmeta().custom_metadata_map[checkpoint.KEY]


def _open_openvino(path: str) -> tuple[GraphRunner, str]:
    import openvino

    core = openvino.Core()
    model = core.read_model(path)
    about = model.get_rt_info([checkpoint.KEY]).astype(str)
    settings: dict[str, Any] = {
        "INFERENCE_PRECISION_HINT": "f32",  # on some CPUs its own choice is bfloat16
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        # Of the layers that it has compiled for a size of their input it would keep 5,000.
        "CPU_RUNTIME_CACHE_CAPACITY": 256,
    }
    compiled = core.compile_model(model, "CPU", settings)

    def run(images: Tensor, outputs: Sequence[str]) -> list[Tensor]:
        results = compiled(images.numpy())
        return [torch.from_numpy(results[name].copy()) for name in outputs]

    return run, about


class Format(NamedTuple):
    """A kind of file.

    Attributes:
        suffix: Of its name.
        packages: That it takes to write one; the last also reads it.
        open: Path -> the network and its description.
    """

    suffix: str
    packages: tuple[str, ...]
    open: Callable[[str], tuple[GraphRunner, str]]


FORMATS = {
    "onnx": Format(".onnx", ("onnx", "onnxscript", "onnxruntime"), _open_onnx),
    "openvino": Format(".xml", ("onnx", "onnxscript", "openvino"), _open_openvino),
}


class ExportedNetwork(Network):
    """A network whose logits an exported graph computes, on the CPU, wherever the images are.

    Args:
        run: The graph.
        preprocessing: `mean`, `std` and `resize` of the graph's description.
    """

    def __init__(self, run: GraphRunner, preprocessing: dict[str, Any]) -> None:
        super().__init__(nn.Identity(), preprocessing["mean"], preprocessing["std"])
        self.run = run
        self.resize = preprocessing["resize"]

    def forward(self, images: Tensor, target: Tensor | None = None) -> dict[str, Tensor]:
        """Compute `out`, the logits float32 [N, K, h, w] of images uint8 [N, C, H, W].

        Raises:
            InputError: The images have another size than that to which the graph resizes them.
        """
        size = tuple(images.shape[-2:])
        if seen_size(self.resize, *size) != size:
            raise InputError(
                f"the exported graph itself resizes every image, to be seen {in_words(self.resize)}"
                ", so that scales of tta would have no effect; leave them out, or give the "
                "checkpoint"
            )
        (logits,) = self.run(images.cpu().contiguous(), ["logits"])
        return {"out": logits.to(images.device)}


def load_network(
    path: str | Path, trust: Sequence[str] = ()
) -> tuple[Network, Labels, dict[str, Any]]:
    """Load the network of a checkpoint, or one that was exported.

    Args:
        path: Of the file, or what else `seg_torch.checkpoints.checkpoint.locate` takes.
        trust: Packages besides seg_torch's own from which the model of a checkpoint may come.

    Returns:
        The network, its classes, and its description, see `checkpoint.describe`.

    Raises:
        InputError: The file cannot be used, see `checkpoint.read` and `open_exported`.
    """
    suffixes = tuple(format.suffix for format in FORMATS.values())
    if str(path).endswith(suffixes) and not str(path).startswith(checkpoint.HUB_SCHEME):
        run, description = open_exported(path)
        network: Network = ExportedNetwork(run, description["preprocessing"])
    else:
        content = checkpoint.read(path)
        network, description = checkpoint.build_network(content, trust), content[checkpoint.KEY]
    return network, Labels.from_dict(description["labels"]), description
