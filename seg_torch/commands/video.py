"""Films: an overlay of every frame, at its own time. Needs PyAV (`seg_torch[video]`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from seg_torch.errors import InputError
from seg_torch.files import write_atomically
from seg_torch.segmenter import Segmenter

SUFFIXES = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".webm")


def predict_video(
    segmenter: Segmenter,
    source: str | Path,
    target: str | Path,
    batch_size: int = 1,
    prepare: Callable[[np.ndarray], np.ndarray] = lambda frame: frame,
) -> int:
    """Writes the overlay of a film, frame for frame, as H.264 without sound.

    Args:
        segmenter: labels the frames.
        source: any film that FFmpeg reads.
        target: the MP4 to write.
        batch_size: frames that go through the network together.
        prepare: changes each frame, uint8 [H, W, 3], before it is labelled.

    Returns:
        The number of frames.

    Raises:
        InputError: PyAV is missing, or the film cannot be read.
    """
    try:
        import av
    except ImportError:
        raise InputError(f"{source}: films need PyAV: pip install seg_torch[video]") from None
    frames = 0

    def read(film: Any) -> Iterator[tuple[np.ndarray, int]]:
        try:
            for frame in film.decode(video=0):
                # Telephones film lying down and note by how much to turn the picture.
                turned = np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90)
                yield prepare(np.ascontiguousarray(turned)), frame.pts
        except av.FFmpegError as error:
            raise InputError(f"{source}: cannot be read after frame {frames}: {error}") from None

    def write(path: str) -> None:
        nonlocal frames
        with av.open(str(source)) as film, av.open(path, "w") as result:
            if not film.streams.video:
                raise InputError(f"{source}: there are no pictures in this film")
            stream = film.streams.video[0]
            rate = stream.average_rate or Fraction(25)
            time_base = stream.time_base
            encoder: Any = None
            for batch in _batches(read(film), batch_size):
                pictures = [picture for picture, _ in batch]
                pictures += pictures[-1:] * (batch_size - len(pictures))
                results = segmenter.predict_batch(pictures)
                for labelled, (_, pts) in zip(results, batch, strict=False):
                    if encoder is None:
                        height, width = labelled.mask.shape
                        encoder = result.add_stream("libx264", rate=rate)
                        encoder.width, encoder.height = width, height
                        # Only without shared colours may a side be odd.
                        even = width % 2 == height % 2 == 0
                        encoder.pix_fmt = "yuv420p" if even else "yuv444p"
                        encoder.codec_context.time_base = time_base
                    frame = av.VideoFrame.from_image(labelled.overlay())
                    frame.pts, frame.time_base = pts, time_base
                    result.mux(encoder.encode(frame))
                    frames += 1
            if encoder is None:
                raise InputError(f"{source}: there are no pictures in this film")
            result.mux(encoder.encode())

    try:
        write_atomically(target, write)
    except av.FFmpegError as error:
        raise InputError(f"{source}: cannot be read as a film: {error}") from None
    return frames


def _batches(items: Iterator[Any], size: int) -> Iterator[list[Any]]:
    batch = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
