"""What predict.py does: segment images and write masks, overlays and a table of them."""

import logging
from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig

from seg_torch import hardware
from seg_torch.distributed import Processes
from seg_torch.errors import InputError, check_choice, require
from seg_torch.images.format import RGB
from seg_torch.images.geotiff import SUFFIXES as TIFF
from seg_torch.images.read import pixel_limit
from seg_torch.prediction.folder import (
    OF_ALL,
    TABLE,
    OutputFolder,
    find_images,
    run_id,
    tell_left_out,
)
from seg_torch.prediction.pipeline import Pipeline, plan_batches
from seg_torch.prediction.segmentation import OUTPUTS
from seg_torch.prediction.segmenter import Segmenter, load_segmenters
from seg_torch.prediction.video import is_video, predict_video

log = logging.getLogger(__name__)


def predict(cfg: DictConfig) -> int:
    """Segment `cfg.input`, an image, a folder of images or a video, into the folder `cfg.output`.

    Returns:
        The number of files that failed.

    Raises:
        InputError: A setting, the input or the output folder cannot be used.
    """
    source, output = Path(cfg.input), Path(cfg.output)
    outputs = _outputs(cfg.save, cfg.compare_with is not None)
    if cfg.batch_size is not None and (not isinstance(cfg.batch_size, int) or cfg.batch_size < 1):
        raise InputError(f"batch_size={cfg.batch_size}: expected at least 1")
    if is_video(source):
        require(f"{source}: a video", "video", "av")
    files = {} if is_video(source) else find_images(source, output)
    processes = Processes(cfg.trainer, most=len(files))
    output = Path(processes.same(str(output)))  # a time in its name differs between them
    if processes.device.type == "cpu":
        hardware.reuse_memory()
        hardware.forget_shapes()
    segmenters = load_segmenters(cfg, processes.device)
    model = next(iter(segmenters.values()))
    if is_video(source):
        return _predict_video(cfg, model, processes)
    if model.format.files:
        files = find_images(source, output, model.format.files)
    if model.format != RGB and any(path.suffix.lower() in TIFF for path in files.values()):
        require("all channels of TIFF files: reading them", "tiff", "tifffile")
    if processes.is_first and source.is_dir():
        tell_left_out(source, files, output, model.format.files)
    processes.start()  # not before all settings are known to be right, or the others wait
    of_each = [name for name in outputs if name != "legend"]
    of_all = [TABLE, *(OF_ALL[name] for name in outputs if name in OF_ALL)]
    # Around all images, so that the weights are cast to another precision only once.
    with (
        pixel_limit(cfg.max_pixels),
        model.inference.autocast(),
        OutputFolder(output, source, files, of_each, of_all, run_id(cfg), processes) as out,
    ):
        batches = processes.first(
            lambda: out.left(plan_batches(files, segmenters, cfg.batch_size), cfg.resume)
        )
        batches = out.share(batches or [])
        Pipeline(segmenters, out).run(batches, progress=processes.is_first)
        processes.wait()
        return out.finish(model.labels) if processes.is_first else 0


def _predict_video(cfg: DictConfig, model: Segmenter, processes: Processes) -> int:
    """Write the overlay of a video; return 1 if not all of it could be read."""
    source, output = Path(cfg.input), Path(cfg.output)
    name = f"{source.stem}.mp4"
    with OutputFolder(output, source, {source.stem: source}, [], [name], "", processes) as out:
        if not processes.is_first:
            return 0
        count, fault = out.write(
            name, lambda path: predict_video(model, source, path, cfg.batch_size, progress=True)
        )
    log.info("%d frames segmented: %s, which is all that is saved of a video", count, output / name)
    if fault is not None:
        log.error("failed: %s: %s", source, fault)
    return int(fault is not None)


def _outputs(save: Sequence[str], side_by_side: bool) -> list[str]:
    """Return what is to be saved; refuse what is unknown, or needs a package that is missing."""
    for output in save:
        check_choice("save", output, ("legend", *OUTPUTS))
    if "geotiff" in save:
        require("save=[geotiff]", "tiff", "tifffile")
    return [*save, *(["side_by_side"] if side_by_side and "side_by_side" not in save else [])]
