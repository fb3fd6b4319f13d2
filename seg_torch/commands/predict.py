"""What predict.py does: segment images and write masks, overlays and a table of them."""

from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig

from seg_torch import hardware
from seg_torch.distributed import Processes
from seg_torch.errors import InputError, check_choice
from seg_torch.images.read import pixel_limit
from seg_torch.prediction.folder import OutputFolder, find_images, run_id
from seg_torch.prediction.pipeline import Pipeline, plan_batches
from seg_torch.prediction.segmentation import OUTPUTS
from seg_torch.prediction.segmenter import load_segmenters
from seg_torch.prediction.video import is_video, predict_video


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
    files = {} if is_video(source) else find_images(source, output)
    processes = Processes(cfg.trainer, most=len(files))
    if processes.device.type == "cpu":
        hardware.reuse_memory()
        hardware.forget_shapes()
    segmenters = load_segmenters(cfg, processes.device)
    model = next(iter(segmenters.values()))
    if is_video(source):
        if processes.is_first:
            predict_video(model, source, output / f"{source.stem}.mp4", cfg.batch_size)
        return 0
    if model.format.files:
        files = find_images(source, output, model.format.files)
    processes.start()  # not before all settings are known to be right, or the others wait
    run = run_id(cfg)
    # Around all images, so that the weights are cast to another precision only once.
    with (
        pixel_limit(cfg.max_pixels),
        model.inference.autocast(),
        OutputFolder(output, source, files, outputs, run, processes) as out,
    ):
        batches = processes.first(
            lambda: out.left(plan_batches(files, segmenters, cfg.batch_size), cfg.resume)
        )
        batches = out.share(batches or [])
        Pipeline(segmenters, out).run(batches, progress=processes.is_first)
        processes.wait()
        return out.finish(model.labels) if processes.is_first else 0


def _outputs(save: Sequence[str], side_by_side: bool) -> list[str]:
    for output in save:
        check_choice("save", output, ("legend", *OUTPUTS))
    return [*save, *(["side_by_side"] if side_by_side and "side_by_side" not in save else [])]
