"""Videos: an overlay of every frame, at its own time."""

import os
import re
import shutil
import sys
import uuid
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from predictions import LABELS, Threshold
from test_predict import threshold  # noqa: F401 (a fixture)

from seg_torch import Segmenter
from seg_torch.commands import predict as command
from seg_torch.commands.predict import predict
from seg_torch.errors import InputError
from seg_torch.files import PARTIAL
from seg_torch.labels import Labels
from seg_torch.models.network import Network
from seg_torch.prediction.video import predict_video

av = pytest.importorskip("av")

MILLISECONDS = [0, 100, 200, 350, 400, 900, 1000]  # a phone drops frames when it likes


@pytest.fixture
def segmenter() -> Segmenter:
    return Segmenter(Network(Threshold(), (0, 0, 0), (1, 1, 1)), LABELS, device="cpu")


def make_video(path: Path, height: int, width: int) -> None:
    """A bright area that grows from the left."""
    with av.open(str(path), "w") as video:
        stream = video.add_stream("libx264", rate=10)
        stream.width, stream.height = width, height
        stream.pix_fmt = "yuv444p"
        stream.codec_context.time_base = Fraction(1, 1000)
        for i, time in enumerate(MILLISECONDS):
            pixels = np.full((height, width, 3), 10, np.uint8)
            pixels[:, : (i + 1) * 8] = 240
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = time, Fraction(1, 1000)
            video.mux(stream.encode(frame))
        video.mux(stream.encode())


def frames(path: Path) -> list[tuple[np.ndarray, float]]:
    with av.open(str(path)) as video:
        return [
            (frame.to_ndarray(format="rgb24"), float(frame.pts * frame.time_base))
            for frame in video.decode(video=0)
        ]


@pytest.mark.parametrize(("height", "width"), [(48, 64), (47, 63)])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_every_frame_has_its_overlay_at_its_time(segmenter, tmp_path, height, width, batch_size):
    """D27: an odd side is made even, since many players show nothing but yuv420p."""
    make_video(tmp_path / "a.mov", height, width)
    assert predict_video(segmenter, tmp_path / "a.mov", tmp_path / "b.mp4", batch_size) == (7, None)
    with av.open(str(tmp_path / "b.mp4")) as video:
        assert video.streams.video[0].pix_fmt == "yuv420p"
    before, after = frames(tmp_path / "a.mov"), frames(tmp_path / "b.mp4")
    assert [time for _, time in after] == [time for _, time in before]
    assert [time for _, time in after] == pytest.approx([t / 1000 for t in MILLISECONDS])
    for (image, _), (drawn, _) in zip(before, after, strict=True):
        expected = np.array(segmenter.predict(image).overlay())
        assert drawn.shape == (48, 64, 3)
        bottom, right = 48 - height, 64 - width
        expected = np.pad(expected, ((0, bottom), (0, right), (0, 0)), "edge")
        assert np.abs(drawn.astype(int) - expected).mean() < 4  # what compression loses


def test_notes_of_a_video_in_no_encoding_are_no_matter(segmenter, tmp_path):
    """FFmpeg writes its name into the file, as cameras do."""
    make_video(tmp_path / "a.mkv", 48, 64)
    content = (tmp_path / "a.mkv").read_bytes()
    assert b"Lavf" in content
    (tmp_path / "b.mkv").write_bytes(content.replace(b"Lavf", b"L\xe6vf"))
    assert predict_video(segmenter, tmp_path / "b.mkv", tmp_path / "c.mp4") == (7, None)


def test_predict_takes_a_video(compose, threshold, tmp_path):  # noqa: F811
    make_video(tmp_path / "a.MP4", 48, 64)
    inputs = (f"input={tmp_path / 'a.MP4'}", f"output={tmp_path / 'out'}")
    assert predict(compose("predict", *inputs)) == 0
    assert [image.shape for image, _ in frames(tmp_path / "out/a.mp4")] == [(48, 64, 3)] * 7


@pytest.mark.parametrize("content", [b"", b"no video", None])
def test_what_is_no_video_is_refused_by_name_and_leaves_nothing(segmenter, tmp_path, content):
    path = tmp_path / "bad.mp4"
    if content is None:
        Image.new("RGB", (8, 8)).save(path, "PNG")
        path.write_bytes(path.read_bytes()[:40])
    else:
        path.write_bytes(content)
    with pytest.raises(InputError, match=r"bad\.mp4"):
        predict_video(segmenter, path, tmp_path / "out.mp4")
    assert [p.name for p in tmp_path.iterdir()] == ["bad.mp4"]


def test_d30_the_last_batch_of_frames_is_not_filled_up(segmenter, tmp_path, monkeypatch):
    make_video(tmp_path / "a.mov", 48, 64)
    lengths = []
    original = segmenter.predict_batch

    def predict_batch(images):
        lengths.append(len(images))
        return original(images)

    monkeypatch.setattr(segmenter, "predict_batch", predict_batch)
    monkeypatch.setattr(segmenter, "batch_size", lambda height, width: 4)
    predict_video(segmenter, tmp_path / "a.mov", tmp_path / "b.mp4")
    assert lengths == [4, 3]


def test_d33_without_pyav_the_message_names_the_library(segmenter, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(
        InputError, match=r"a\.mov: a video needs av: pip install -e '.*\[video\]'$"
    ):
        predict_video(segmenter, tmp_path / "a.mov", tmp_path / "b.mp4")


# What a player makes of the result


GREEN = (32, 192, 64)
# Weights of red and blue in the brightness of ITU-R BT.601 and BT.709.
WEIGHTS = {"601": (0.299, 0.114), "709": (0.2126, 0.0722)}
TAGS = {"601": (6, 6, 6, 1), "709": (1, 1, 1, 1)}  # matrix, primaries, transfer, limited range


def to_yuv(rgb: tuple[int, int, int], matrix: str) -> list[int]:
    """By the formulas of the standards."""
    (red, blue), (r, g, b) = WEIGHTS[matrix], (value / 255 for value in rgb)
    y = red * r + (1 - red - blue) * g + blue * b
    chroma = (b - y) / (2 * (1 - blue)), (r - y) / (2 * (1 - red))
    return [round(16 + 219 * y), *(round(128 + 224 * c) for c in chroma)]


def to_rgb(yuv: list[int], matrix: str) -> list[float]:
    red, blue = WEIGHTS[matrix]
    y, b, r = (yuv[0] - 16) / 219, (yuv[1] - 128) / 224, (yuv[2] - 128) / 224
    r, b = y + 2 * (1 - red) * r, y + 2 * (1 - blue) * b
    return [255 * r, 255 * (y - red * r - blue * b) / (1 - red - blue), 255 * b]


def plain_video(
    path: Path, yuv: list[int], tags: tuple | None, height: int = 48, start: int = 0, **stream: Any
) -> None:
    """Three frames of one colour, written as YUV, a tenth of a second each."""
    with av.open(str(path), "w") as video:
        encoder = video.add_stream("libx264", rate=10)
        encoder.width, encoder.height, encoder.pix_fmt = 64, height, "yuv420p"
        context = encoder.codec_context
        context.time_base = Fraction(1, 1000)
        names = ("colorspace", "color_primaries", "color_trc", "color_range")
        for name, value in [*zip(names, tags or (), strict=False), *stream.items()]:
            setattr(context, name, value)
        for i in range(3):
            frame = av.VideoFrame(64, height, "yuv420p")
            for plane, value in zip(frame.planes, yuv, strict=True):
                plane.update(bytes([value]) * plane.buffer_size)
            frame.pts, frame.time_base = start + 100 * i, Fraction(1, 1000)
            video.mux(encoder.encode(frame))
        video.mux(encoder.encode())


@pytest.mark.parametrize(
    ("tagged", "height", "seen"),
    [("709", 48, "709"), ("601", 720, "601"), (None, 720, "709"), (None, 48, "601")],
)
def test_e61_the_colours_of_a_video_stay(tmp_path, tagged, height, seen):
    """A stream without tags is shown as its height says; the result says it itself."""
    labels = Labels(("dark", "bright"), np.array([GREEN, GREEN]))
    segmenter = Segmenter(Network(Threshold(), (0, 0, 0), (1, 1, 1)), labels, device="cpu")
    plain_video(tmp_path / "a.mov", to_yuv(GREEN, seen), tagged and TAGS[tagged], height)
    predict_video(segmenter, tmp_path / "a.mov", tmp_path / "b.mp4")
    with av.open(str(tmp_path / "b.mp4")) as video:
        context = video.streams.video[0].codec_context
        found = context.colorspace, context.color_primaries, context.color_trc, context.color_range
        assert found == TAGS[seen]
        frame = next(video.decode(video=0))
    yuv = [int(np.frombuffer(plane, np.uint8)[0]) for plane in frame.planes]
    assert to_rgb(yuv, seen) == pytest.approx(GREEN, abs=4)


def test_e61_a_recording_begins_with_its_first_frame_and_keeps_its_shape(segmenter, tmp_path):
    ratio = Fraction(4, 3)
    plain_video(
        tmp_path / "a.mkv", to_yuv(GREEN, "709"), None, start=101_000, sample_aspect_ratio=ratio
    )
    assert frames(tmp_path / "a.mkv")[0][1] == 101
    predict_video(segmenter, tmp_path / "a.mkv", tmp_path / "b.mp4")
    assert [time for _, time in frames(tmp_path / "b.mp4")] == pytest.approx([0, 0.1, 0.2])
    with av.open(str(tmp_path / "b.mp4")) as video:
        assert video.streams.video[0].sample_aspect_ratio == ratio
        assert video.duration == pytest.approx(300_000, abs=50_000)  # microseconds


def with_sound(path: Path, codec: str, start: int = 0) -> None:
    """Half a second of pictures and of a tone."""
    with av.open(str(path), "w") as video:
        pictures = video.add_stream("libx264", rate=10)
        pictures.width, pictures.height, pictures.pix_fmt = 64, 48, "yuv420p"
        sound = video.add_stream(codec, rate=8000)
        sound.layout = "mono"
        tone = (8000 * np.sin(np.arange(4000) / 5)).astype(np.int16)
        for i in range(5):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 50 * i, np.uint8))
            frame.pts, frame.time_base = i + 10 * start, Fraction(1, 10)
            video.mux(pictures.encode(frame))
            part = av.AudioFrame.from_ndarray(tone[None, 800 * i : 800 * (i + 1)], "s16", "mono")
            part.sample_rate, part.pts = 8000, 800 * i + 8000 * start
            part.time_base = Fraction(1, 8000)
            video.mux(sound.encode(part))
        for stream in (pictures, sound):
            video.mux(stream.encode())


def sound_of(path: Path) -> tuple[np.ndarray, float]:
    """The values, and when they begin."""
    with av.open(str(path)) as video:
        parts = [(frame.to_ndarray(), float(frame.time)) for frame in video.decode(audio=0)]
    return np.concatenate([values for values, _ in parts], axis=1), parts[0][1]


def test_e61_the_sound_of_a_video_is_kept(segmenter, tmp_path):
    with_sound(tmp_path / "a.mov", "aac", start=3)
    assert predict_video(segmenter, tmp_path / "a.mov", tmp_path / "b.mp4") == (5, None)
    (before, began), (after, begins) = (sound_of(tmp_path / n) for n in ("a.mov", "b.mp4"))
    assert np.array_equal(before, after)
    first = [frames(tmp_path / name)[0][1] for name in ("a.mov", "b.mp4")]
    assert begins - first[1] == pytest.approx(began - first[0], abs=1e-3)


def test_e61_sound_that_cannot_be_kept_is_told(segmenter, tmp_path, caplog):
    with_sound(tmp_path / "a.mov", "pcm_s16le")
    assert predict_video(segmenter, tmp_path / "a.mov", tmp_path / "b.mp4") == (5, None)
    assert "a.mov: the sound is left out: an MP4 file does not take pcm_s16le" in caplog.text
    with av.open(str(tmp_path / "b.mp4")) as video:
        assert not video.streams.audio


@pytest.mark.usefixtures("threshold")
@pytest.mark.parametrize("suffix", [".mkv", ".mp4"])
def test_e61_a_video_that_is_cut_off_is_told_and_ends_with_1(compose, tmp_path, caplog, suffix):
    path = tmp_path / f"a{suffix}"
    options = {"movflags": "faststart"} if suffix == ".mp4" else {}
    noise = np.random.default_rng(0).integers(0, 256, (30, 48, 64, 3), np.uint8)
    with av.open(str(path), "w", options=options) as video:
        stream = video.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for pixels in noise:
            video.mux(stream.encode(av.VideoFrame.from_ndarray(pixels)))
        video.mux(stream.encode())
    arguments = (f"input={path}", f"output={tmp_path / 'out'}")
    assert predict(compose("predict", *arguments)) == 0
    assert len(frames(tmp_path / "out/a.mp4")) == 30
    with av.open(str(path)) as video:  # between two frames: what half a one gives is uncertain
        places = [packet.pos for packet in video.demux(video=0) if packet.size]
    path.write_bytes(path.read_bytes()[: places[17]])
    assert predict(compose("predict", *arguments)) == 1
    (failure,) = [r.getMessage() for r in caplog.records if r.getMessage().startswith("failed")]
    assert re.search(rf"a{suffix}: cut off( or damaged)?: (17 of 30 frames|it ends after)", failure)
    assert len(frames(tmp_path / "out/a.mp4")) == 17


def test_e61_what_a_killed_run_has_left_is_deleted(compose, segmenter, tmp_path, monkeypatch):
    make_video(tmp_path / "a.mov", 48, 64)
    arguments = (f"input={tmp_path / 'a.mov'}", f"output={tmp_path / 'out'}")
    cfg = compose("predict", *arguments)
    monkeypatch.setattr(command, "load_segmenters", lambda *_: {"model": segmenter})
    replace = os.replace

    def replace_and_leave(source: str, target: str) -> None:
        """A killed process does not clean up: a draft stays where the drafts are."""
        if Path(target).suffix == ".mp4":
            shutil.copy(source, Path(source).with_name(f"{PARTIAL}{uuid.uuid4().hex}.mp4"))
        replace(source, target)

    monkeypatch.setattr(os, "replace", replace_and_leave)
    assert predict(cfg) == 0
    assert list((tmp_path / "out").rglob(f"{PARTIAL}*.mp4"))
    monkeypatch.undo()
    monkeypatch.setattr(command, "load_segmenters", lambda *_: {"model": segmenter})
    assert predict(cfg) == 0
    assert not list((tmp_path / "out").rglob(f"{PARTIAL}*"))
    assert len(frames(tmp_path / "out/a.mp4")) == 7


@pytest.mark.usefixtures("threshold")
def test_e58_a_video_is_not_replaced_by_its_overlay(compose, segmenter, tmp_path):
    (tmp_path / "d").mkdir()
    make_video(tmp_path / "d/clip.mp4", 48, 64)
    (tmp_path / "link").symlink_to(tmp_path / "d")
    before = (tmp_path / "d/clip.mp4").read_bytes()
    for output in ("d", "link", "d/../link"):
        with pytest.raises(InputError, match=r"clip\.mp4 is an input; it would be replaced"):
            predict(
                compose("predict", f"input={tmp_path}/d/clip.mp4", f"output={tmp_path}/{output}")
            )
    with pytest.raises(InputError, match=r"clip\.mp4: its overlay would take its place"):
        predict_video(segmenter, tmp_path / "d/clip.mp4", tmp_path / "link/clip.mp4")
    (tmp_path / "d/clip.mp4").rename(tmp_path / "d/clip.mov")
    (tmp_path / "d/clip.mp4").write_text("another one")
    with pytest.raises(InputError, match=r"clip\.mp4 is there already, and not from predict"):
        predict(compose("predict", f"input={tmp_path}/d/clip.mov", f"output={tmp_path}/d"))
    assert (tmp_path / "d/clip.mov").read_bytes() == before
    assert (tmp_path / "d/clip.mp4").read_text() == "another one"
    assert sorted(p.name for p in (tmp_path / "d").iterdir()) == ["clip.mov", "clip.mp4"]


def test_e44_pyav_is_looked_for_before_the_model_is_loaded(compose, tmp_path, monkeypatch):
    (tmp_path / "a.mp4").touch()
    monkeypatch.setitem(sys.modules, "av", None)
    cfg = compose("predict", f"input={tmp_path / 'a.mp4'}", f"output={tmp_path / 'out'}")
    cfg.checkpoint = str(tmp_path / "missing.ckpt")
    with pytest.raises(InputError, match=r"a\.mp4: a video needs av"):
        predict(cfg)
