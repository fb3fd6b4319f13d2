"""seg-torch serve: one server process that all tests talk to."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image
from predictions import FOUR, random_checkpoint

from seg_torch import Segmenter
from seg_torch.commands.serve import serve
from seg_torch.errors import InputError

ROOT = Path(__file__).parents[2]
SIZES = [(40, 56), (64, 48), (33, 70)]
MAX_BATCH = 3


def photo(number: int) -> Image.Image:
    height, width = SIZES[number % len(SIZES)]
    small = np.random.default_rng(number).integers(0, 256, (5, 5, 3), np.uint8)
    return Image.fromarray(small).resize((width, height))


def encoded(image: Image.Image, suffix: str = "PNG", **settings: object) -> bytes:
    file = BytesIO()
    image.save(file, suffix, **settings)
    return file.getvalue()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(folder: Path, *settings: str) -> subprocess.Popen:
    places = [f"checkpoint={folder / 'random.ckpt'}", "trainer.accelerator=cpu"]
    return subprocess.Popen(
        [sys.executable, "-m", "seg_torch", "serve", *places, *settings],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=(folder / "stderr").open("w"),
        start_new_session=True,
    )


def members(session: int) -> set[int]:
    """The processes of a session that are more than a line in the table."""
    found = set()
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rpartition(")")[2].split()
        except OSError:  # it has just ended
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            found.add(int(status.parent.name))
    return found


@pytest.fixture(scope="module")
def stderr(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("serve") / "stderr"


@pytest.fixture(scope="module")
def server(stderr):
    """The process, a client, and the checkpoint's own segmenter."""
    folder = stderr.parent
    weights = random_checkpoint(folder / "random.ckpt")
    port = free_port()
    limits = (f"port={port}", "max_pixels=40_000", "max_megabytes=1", "trainer.precision=32-true")
    process = start(folder, *limits, f"max_batch_size={MAX_BATCH}", "batch_timeout=0.1")
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60, trust_env=False) as client:
        try:
            for _ in range(1200):
                assert process.poll() is None, (folder / "stderr").read_text()
                try:
                    if client.get("/health").text == "ok":
                        break
                except httpx.TransportError:
                    time.sleep(0.1)
            else:
                pytest.fail("the server does not start")
            yield process, client, Segmenter.load(weights, device="cpu", precision="32-true")
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(timeout=60)


def possible(segmenter: Segmenter, image: Image.Image) -> list[bytes]:
    """Masks by the length of the batch, on which alone the rounding depends."""
    return [segmenter.predict_batch([image] * n)[0].mask.tobytes() for n in range(1, MAX_BATCH + 1)]


def test_requests_of_several_sizes_at_once_each_get_their_own_mask(server):
    _, client, segmenter = server

    def ask(number: int) -> bytes:
        files = {"file": (f"{number}.png", encoded(photo(number)))}
        answer = client.post("/predict", files=files)
        assert answer.status_code == 200, answer.text
        assert answer.headers["content-type"] == "image/png"
        return answer.content

    with ThreadPoolExecutor(20) as clients:
        answers = list(clients.map(ask, range(20)))
    for number, answer in enumerate(answers):
        with Image.open(BytesIO(answer)) as mask:
            assert np.array(mask).tobytes() in possible(segmenter, photo(number))
            assert json.loads(mask.text["names"]) == list(FOUR.names)
            assert mask.getpalette()[: 3 * len(FOUR)] == FOUR.palette.ravel().tolist()


@pytest.mark.parametrize("way", ["query", "accept"])
def test_json_has_the_shares_the_confidence_and_the_polygons(server, way):
    _, client, segmenter = server
    asked = {"params": {"format": "json"}} if way == "query" else {}
    headers = {"Content-Type": "image/png"}
    if way == "accept":
        headers["Accept"] = "application/json"
    answer = client.post("/predict", content=encoded(photo(0)), headers=headers, **asked)
    result = segmenter.predict(photo(0))
    expected = {"height": 40, "width": 56, "areas": result.areas(), "polygons": result.polygons()}
    content = answer.json()
    assert content.pop("confidence") == pytest.approx(result.confidence)
    assert content == expected


def test_a_photo_that_lies_on_its_side_comes_back_upright(server):
    _, client, _ = server
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turned by 90 degrees
    answer = client.post("/predict", files={"x": encoded(photo(0), "JPEG", exif=exif)})
    assert Image.open(BytesIO(answer.content)).size == (40, 56)


PNG = {"Content-Type": "image/png"}
MISTAKES = {
    "no file": ({"data": {"a": "b"}, "files": {"c": (None, "d")}}, 400, "the form has no file"),
    "no image": ({"files": {"f": ("a.txt", b"text")}}, 400, "a.txt: cannot be read as an image"),
    "cut off": ({"content": encoded(photo(0))[:200], "headers": PNG}, 400, "cannot be read"),
    "empty": ({"content": b"", "headers": PNG}, 400, "the file is empty"),
    "pixels": (
        {"content": encoded(Image.new("L", (200, 201))), "headers": PNG},
        413,
        "the image has 40,200 pixels; the limit is 40,000",
    ),
    "bytes": ({"content": bytes(1_000_001), "headers": PNG}, 413, "Payload too large"),
    "form bytes": ({"files": {"f": bytes(1_000_001)}}, 413, "Payload too large"),
    "type": ({"content": b"x", "headers": {"Content-Type": "text/plain"}}, 415, "is text/plain"),
    "no type": ({"content": encoded(photo(0))}, 415, "the content type is missing"),
    "format": ({"files": {"f": b""}, "params": {"format": "gif"}}, 400, "use png or json"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_answered_with_its_reason(server, mistake):
    process, client, _ = server
    request, code, reason = MISTAKES[mistake]
    answer = client.post("/predict", **request)
    assert (answer.status_code, answer.headers["content-type"]) == (code, "application/json")
    assert reason in answer.json()["detail"]
    assert process.poll() is None


def test_a_damaged_image_does_not_fail_those_of_its_batch(server):
    _, client, _ = server

    def ask(number: int) -> httpx.Response:
        content = b"text" if number == 1 else encoded(photo(0))
        return client.post("/predict", content=content, headers=PNG)

    with ThreadPoolExecutor(MAX_BATCH) as clients:
        answers = list(clients.map(ask, range(MAX_BATCH)))
    assert [answer.status_code for answer in answers] == [200, 400, 200]


def test_info_tells_the_classes_the_versions_and_the_limits(server):
    _, client, _ = server
    about = client.get("/info").json()["model"]
    assert about["names"] == list(FOUR.names)
    assert about["palette"] == FOUR.palette.tolist()
    assert about["limits"] == {"max_megabytes": 1, "max_pixels": 40_000}
    assert about["versions"].keys() == {"seg_torch", "torch"}


@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        ("host=example.org", "host is 'example.org'; use one of 127.0.0.1"),
        ("port=80", "port=80: expected 1024 to 65535"),
        ("workers=0", "workers=0: expected at least 1"),
        ("max_batch_size=0", "max_batch_size=0: expected at least 1"),
        ("max_batch_size=a", "max_batch_size=a: expected at least 1"),
        ("batch_timeout=60", "batch_timeout=60: expected 0 to timeout=60"),
    ],
)
def test_impossible_settings_are_named(setting, reason, compose):
    with pytest.raises(InputError) as error:
        serve(compose("serve", setting))
    assert reason in str(error.value)


def test_a_port_that_is_taken_is_named(server, compose):
    port = server[1].base_url.port
    with pytest.raises(InputError, match=f"port={port}: Address already in use; use another one"):
        serve(compose("serve", f"port={port}"))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_kill_ends_it_without_a_word_and_leaves_no_process(server, stderr):
    """The last test: the server is the one of all others."""
    process, client, _ = server
    assert len(members(process.pid)) >= 3
    process.terminate()
    assert process.wait(timeout=60) == 0
    for _ in range(100):
        if not (left := members(process.pid)):
            break
        time.sleep(0.05)
    assert not left
    with pytest.raises(httpx.TransportError):
        client.get("/health")
    assert stderr.read_text() == ""
