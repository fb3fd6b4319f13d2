"""Videos: an overlay of every frame, at its own time."""

import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from predictions import LABELS, Threshold
from test_predict import threshold  # noqa: F401 (a fixture)

from seg_torch import Segmenter
from seg_torch.commands.predict import predict
from seg_torch.errors import InputError
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
    assert predict_video(segmenter, tmp_path / "a.mov", tmp_path / "b.mp4", batch_size) == 7
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
