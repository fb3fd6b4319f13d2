"""Videos: the overlay of every frame at its own time. Needs PyAV."""

import logging
from collections.abc import Iterator
from fractions import Fraction
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import track

from seg_torch.errors import InputError, reason, require
from seg_torch.files import write_atomically
from seg_torch.prediction.segmenter import Segmenter

log = logging.getLogger(__name__)

SUFFIXES = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".webm")
# Matrices between RGB and YUV: their number in a stream -> swscale's, whose own choice is 5.
MATRICES = {1: 1, 5: 5, 6: 5, 7: 7, 9: 9}
BT_709, BT_601 = 1, 6
HD = 720  # lines from which on players take BT.709 where a stream does not say
UNKNOWN = 2  # colours of a stream that does not say
LIMITED = 1  # the range that values of videos usually have
# Decoders of the sound that MP4 files can hold.
SOUND = ("aac", "ac3", "alac", "eac3", "flac", "libopus", "mp3", "mp3float", "opus")
# What ends so many seconds, and more than a frame, before the end that it states is cut off.
MISSING = 0.2


def is_video(path: Path) -> bool:
    """Whether a path is that of a video, judging by its name."""
    return path.suffix.lower() in SUFFIXES and path.is_file()


def predict_video(
    segmenter: Segmenter,
    source: str | Path,
    target: str | Path,
    batch_size: int | None = None,
    progress: bool = False,
) -> tuple[int, str | None]:
    """Write the overlay of a video, frame by frame, as H.264 (yuv420p), with its sound.

    Args:
        segmenter: Segments the frames.
        source: Any video that FFmpeg reads.
        target: The MP4 file to write.
        batch_size: Frames that go through the network together; `None`: by memory.
        progress: Show a bar.

    Returns:
        The number of frames, and what of the source could not be read, if anything.

    Raises:
        InputError: PyAV is missing, there is not one frame that can be read, or the target cannot
            be written or is the source.
    """
    require(f"{source}: a video", "video", "av")
    import av

    if Path(target).exists() and Path(target).samefile(source):
        raise InputError(f"{source}: its overlay would take its place; give another folder")
    try:
        opened = av.open(str(source), metadata_errors="replace")  # notes of any bytes
        with opened as video, segmenter.inference.autocast():  # as for images
            reader = _Reader(video)
            first = next(reader.frames, None)
            if first is None:
                raise InputError(f"{source}: there are no frames in this file that can be read")

            def write(path: str) -> None:
                with av.open(path, "w") as result:
                    _write(segmenter, reader, first, result, batch_size, progress)

            write_atomically(target, write)
            fault = reader.fault()
    except av.FFmpegError as error:
        raise InputError(f"{source}: cannot be segmented: {reason(error)}") from None
    if reader.dropped:
        names = ", ".join(sorted(reader.dropped))
        log.warning("%s: the sound is left out: an MP4 file does not take %s", source, names)
    return reader.count, fault


class _Reader:
    """Reads the frames of a video, and keeps the packets of its sound meanwhile.

    Args:
        video: The open file.

    Attributes:
        frames: Iterator of upright frames, uint8 [H, W, 3], and their times in units of `stream`.
        packets: Those of the sound up to the frame that was read last.
    """

    def __init__(self, video: Any) -> None:
        self.video, self.stream = video, video.streams.best("video")
        names = {stream: stream.codec_context.name for stream in video.streams.audio}
        self.sound = [stream for stream, name in names.items() if name in SOUND]
        self.dropped = {name for name in names.values() if name not in SOUND}
        self.packets: list[Any] = []
        self.count = self.damaged = 0
        self.end = Fraction(0)  # of what was read, in seconds
        self.frames = self._read()

    def _read(self) -> Iterator[tuple[np.ndarray, int]]:
        size, time = (0, 0), -1
        for frame in self._decoded():
            if self.count == 0:
                size, time = (frame.width, frame.height), (frame.pts or 0) - 1
                self.sideways = frame.rotation % 180 != 0
                usual = BT_709 if frame.height >= HD else BT_601
                self.matrix = frame.colorspace if frame.colorspace in MATRICES else usual
            tag = self.matrix if frame.colorspace == UNKNOWN else frame.colorspace
            colours = {"src_colorspace": MATRICES.get(tag), "dst_colorspace": 5}
            rgb = frame.reformat(*size, format="rgb24", **colours).to_ndarray()
            time = time + 1 if frame.pts is None else max(frame.pts, time + 1)
            self.count += 1
            # Phones record sideways and note by how much to turn the frames.
            yield np.ascontiguousarray(np.rot90(rgb, frame.rotation // 90)), time

    def _decoded(self) -> Iterator[Any]:
        """Yield what can be decoded, and count what cannot."""
        import av

        for packet in self._demuxed() if self.stream else ():
            self.damaged += packet.is_corrupt
            if packet.pts is not None:
                end = (packet.pts + (packet.duration or 0)) * packet.time_base
                self.end = max(self.end, end)
            if packet.stream in self.sound and packet.size:
                self.packets.append(packet)
            if packet.stream != self.stream:
                continue
            try:
                for frame in packet.decode():
                    # A recording may begin with the rest of a frame.
                    self.damaged += bool(frame.is_corrupt and self.count)
                    yield frame
            except av.FFmpegError:
                self.damaged += 1

    def _demuxed(self) -> Iterator[Any]:
        import av

        try:
            yield from self.video.demux()
        except av.FFmpegError:
            self.damaged += 1

    def fault(self) -> str | None:
        """Return what is wrong with the file, after all of it was read."""
        length = (self.video.duration or 0) / 1_000_000
        of_all = f" of {self.stream.frames}" if self.stream.frames > self.count else ""
        if self.damaged:
            return f"cut off or damaged: {self.count}{of_all} frames could be read"
        frame = float(1 / (self.stream.average_rate or 25))
        if self.end < length - max(MISSING, 1.5 * frame):
            return f"cut off: it ends after {float(self.end):.1f} of {length:.1f} seconds"
        return None


def _write(
    segmenter: Segmenter,
    reader: _Reader,
    first: tuple[np.ndarray, int],
    result: Any,
    batch_size: int | None,
    progress: bool,
) -> None:
    """Write the overlays of all frames, and the sound, into an open file."""
    height, width = first[0].shape[:2]
    encoder = _encoder(result, reader, height, width)
    sound = {stream: result.add_stream_from_template(stream) for stream in reader.sound}
    # Whatever the clock of a recording said, the file begins with its beginning.
    starts = [s.start_time * s.time_base for s in reader.sound if s.start_time is not None]
    start = min([first[1] * reader.stream.time_base, *starts])
    frames = chain([first], reader.frames)
    overlays = _overlays(segmenter, frames, batch_size or segmenter.batch_size(height, width))
    total = reader.stream.frames or None
    for overlay, time in track(
        overlays, "predicting", total, disable=not progress, refresh_per_second=2
    ):
        result.mux(encoder.encode(_frame(overlay, reader, time, start)))
        _mux_sound(result, reader, sound, start)
    result.mux(encoder.encode())
    _mux_sound(result, reader, sound, start)


def _frame(overlay: np.ndarray, reader: _Reader, time: int, start: Fraction) -> Any:
    """Return an overlay as a frame of the stream that `_encoder` adds."""
    import av

    rgb = av.VideoFrame.from_ndarray(overlay, format="rgb24")
    matrix = MATRICES[reader.matrix]
    frame = rgb.reformat(format="yuv420p", dst_colorspace=matrix, dst_color_range=LIMITED)
    frame.time_base = reader.stream.time_base
    frame.pts = time - round(start / frame.time_base)
    return frame


def _mux_sound(result: Any, reader: _Reader, sound: dict[Any, Any], start: Fraction) -> None:
    """Write the packets of the sound that were read meanwhile."""
    for packet in reader.packets:
        shift = round(start / packet.time_base)
        packet.stream = sound[packet.stream]
        packet.pts, packet.dts = (t if t is None else t - shift for t in (packet.pts, packet.dts))
        result.mux(packet)
    reader.packets.clear()


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


def _encoder(result: Any, reader: _Reader, height: int, width: int) -> Any:
    """Add an H.264 stream to a file, with the times, the rate and the colours of the source's."""
    source = reader.stream
    encoder = result.add_stream("libx264", rate=source.average_rate or Fraction(25))
    encoder.width, encoder.height = width + width % 2, height + height % 2
    encoder.pix_fmt = "yuv420p"  # what every player shows
    context, known = encoder.codec_context, source.codec_context
    context.time_base = source.time_base
    context.colorspace, context.color_range = reader.matrix, LIMITED
    for name in ("color_primaries", "color_trc"):
        tag = getattr(known, name)
        setattr(context, name, reader.matrix if tag == UNKNOWN else tag)
    if ratio := source.sample_aspect_ratio:
        context.sample_aspect_ratio = 1 / ratio if reader.sideways else ratio
    return encoder
