"""Videos: the overlay of every frame at its own time. Needs PyAV."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from fractions import Fraction
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from seg_torch.errors import InputError, require
from seg_torch.files import write_atomically
from seg_torch.prediction.segmenter import Segmenter

log = logging.getLogger(__name__)

SUFFIXES = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".webm")


def is_video(path: Path) -> bool:
    """Whether a path is that of a video, judging by its name."""
    return path.suffix.lower() in SUFFIXES and path.is_file()


def predict_video(
    segmenter: Segmenter,
    source: str | Path,
    target: str | Path,
    batch_size: int | None = None,
) -> int:
    """Write the overlay of a video, frame by frame, as H.264 (yuv420p) without sound.

    Args:
        segmenter: Segments the frames.
        source: Any video that FFmpeg reads.
        target: The MP4 file to write.
        batch_size: Frames that go through the network together; `None`: by memory.

    Returns:
        The number of frames.

    Raises:
        InputError: PyAV is missing, or the video cannot be read.
    """
    require(f"{source}: a video", "video", "av")
    import av

    frames = 0

    def write(path: str) -> None:
        nonlocal frames
        with av.open(str(source)) as video, av.open(path, "w") as result:
            read = _frames(video)
            first = next(read, None)
            if first is None:
                raise InputError(f"{source}: there are no frames in this file")
            height, width = first[0].shape[:2]
            encoder = _encoder(result, video.streams.video[0], height, width)
            count = batch_size or segmenter.batch_size(height, width)
            for overlay, time in _overlays(segmenter, chain([first], read), count):
                frame = av.VideoFrame.from_ndarray(overlay, format="rgb24")
                frame.pts, frame.time_base = time, encoder.codec_context.time_base
                result.mux(encoder.encode(frame))
                frames += 1
            result.mux(encoder.encode())

    try:
        with segmenter.inference.autocast():  # as for images
            write_atomically(target, write)
    except av.FFmpegError as error:
        raise InputError(f"{source}: cannot be read after frame {frames}: {error}") from None
    log.info("%d frames segmented: %s", frames, target)
    return frames


def _frames(video: Any) -> Iterator[Any]:
    """Yield the upright frames, uint8 [H, W, 3], and their times in the units of the stream."""
    for frame in video.decode(video=0) if video.streams.video else ():
        # Phones record sideways and note by how much to turn the frames.
        turned = np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90)
        yield np.ascontiguousarray(turned), frame.pts


def _overlays(segmenter: Segmenter, frames: Iterator[Any], batch_size: int) -> Iterator[Any]:
    """Yield the overlays of frames, and their times.

    The last row and column are repeated where a side is odd, which yuv420p cannot store.
    """
    while batch := list(islice(frames, batch_size)):
        results = segmenter.predict_batch([image for image, _ in batch])
        for segmentation, (_, time) in zip(results, batch, strict=True):
            overlay = np.asarray(segmentation.overlay())
            bottom, right = (side % 2 for side in overlay.shape[:2])
            yield np.pad(overlay, ((0, bottom), (0, right), (0, 0)), "edge"), time


def _encoder(result: Any, source: Any, height: int, width: int) -> Any:
    """Add an H.264 stream to a file, with the times and the rate of the source's stream."""
    encoder = result.add_stream("libx264", rate=source.average_rate or Fraction(25))
    encoder.width, encoder.height = width + width % 2, height + height % 2
    encoder.pix_fmt = "yuv420p"  # what every player shows
    encoder.codec_context.time_base = source.time_base
    return encoder
