"""seg-torch serve: one server that most tests talk to, and its parts by themselves."""

import asyncio
import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from unittest.mock import Mock

import httpx
import numpy as np
import pytest
import torch
import uvicorn
from fastapi import Response
from omegaconf import OmegaConf
from PIL import Image
from ports import free_port
from predictions import FOUR, random_checkpoint

from seg_torch import Segmenter
from seg_torch.commands.serve import serve
from seg_torch.errors import InputError
from seg_torch.serving import batching
from seg_torch.serving.batching import Batcher
from seg_torch.serving.model import Upload
from seg_torch.serving.server import _devices, create_app, public_name

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
    assert about["model"] == "random.ckpt", "its folder is no business of the client"
    assert "PNG" in about["formats"]


@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        ("host=192.0.2.1", "host=192.0.2.1 port=8000: Cannot assign requested address; use an"),
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


def test_the_page_may_load_nothing_from_elsewhere(server):
    _, client, _ = server
    for path in ("/", "/page.css", "/page.js", "/icon.svg"):
        answer = client.get(path)
        assert answer.status_code == 200
        assert "default-src 'self'" in answer.headers["content-security-policy"]
        loaded = re.findall(
            r"""(?:src|href)=["']([^"']+)|url\(([^)]+)|import ([^;]+)""", answer.text
        )
        assert {name for names in loaded for name in names if name} <= {
            "icon.svg",
            "page.css",
            "page.js",
        }


def test_a_body_that_never_ends_is_refused(server):
    _, client, _ = server
    head = b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\n"
    with socket.create_connection(("127.0.0.1", client.base_url.port), timeout=30) as connection:
        connection.sendall(head + b"Transfer-Encoding: chunked\r\n\r\n")
        answer = b""
        for _ in range(500):
            try:
                if select.select([connection], [], [], 0.01)[0]:
                    answer += (got := connection.recv(1000))
                    if not got:
                        break
                connection.sendall(b"10000\r\n" + bytes(0x10000) + b"\r\n")
            except OSError:
                break
        else:
            pytest.fail("32 MB were taken where 1 MB is the limit")
    assert answer.startswith(b"HTTP/1.1 413 ")


# What the server does where its clients, its processes or their model fail


class Worker:
    """Stands for a process with a model: a test answers its batches by hand."""

    def __init__(self, cfg: object, device: str) -> None:
        self.loaded: Future = Future()
        self.loaded.set_result({})
        self.batches: list[tuple[list[str], Future]] = []

    def submit(self, uploads: list[Upload]) -> Future:
        self.batches.append(([upload.name for upload in uploads], Future()))
        return self.batches[-1][1]

    def is_ready(self) -> bool:
        return not self.loaded.exception()

    def check(self) -> None:
        pass


@pytest.fixture
def batcher(monkeypatch) -> Batcher:
    """Of batches of two, which wait for each other no longer than 10 ms."""
    monkeypatch.setattr(batching, "Worker", Worker)
    return Batcher(OmegaConf.create({"batch_timeout": 0.01, "timeout": 0.2}), ["cpu"], 2)


def by_name(name: str) -> Upload:
    return Upload(name, b"", "png")


async def until(condition: Callable[[], object]) -> None:
    for _ in range(500):
        if condition():
            return
        await asyncio.sleep(0.01)
    pytest.fail("it does not happen")


def test_what_nobody_waits_for_any_more_is_not_worked_on(batcher):
    async def scenario() -> None:
        (worker,) = batcher.workers
        async with batcher.running():
            first = batcher.submit(by_name("first"))
            await until(lambda: worker.batches)
            assert worker.batches[0][0] == ["first"]
            hung_up = batcher.submit(by_name("hung up"))
            hung_up.cancel()
            late = await batcher.submit(by_name("late"))
            assert late.status_code == 504
            assert b"has waited for 0.2 seconds" in late.body
            assert not first.done(), "it does not wait, it is worked on"
            rest = [batcher.submit(by_name(name)) for name in "abc"]
            worker.batches[0][1].set_result([Response("1")])
            assert (await first).body == b"1"
            await until(lambda: len(worker.batches) == 2)
            assert worker.batches[1][0] == ["a", "b"]
            worker.batches[1][1].set_result([Response("2"), Response("3")])
            assert [(await answer).body for answer in rest[:2]] == [b"2", b"3"]
            await until(lambda: len(worker.batches) == 3)
            assert worker.batches[2][0] == ["c"]

    asyncio.run(scenario())


def test_e64_clients_that_hang_up_are_not_worked_off(batcher):
    """By real connections: the next client waits for what is at work alone."""

    async def scenario() -> None:
        (worker,) = batcher.workers
        batcher.timeout = 60
        port = free_port()
        settings = uvicorn.Config(create_app(batcher, {}, 1000), port=port, log_level="error")
        server = uvicorn.Server(settings)
        running = asyncio.create_task(server.serve())
        await until(lambda: server.started)

        async def ask(name: str) -> asyncio.StreamWriter:
            form = f'--x\r\nContent-Disposition: form-data; name="f"; filename="{name}"\r\n\r\n.'
            form += "\r\n--x--\r\n"
            head = "POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: "
            head += f"{len(form)}\r\nContent-Type: multipart/form-data; boundary=x\r\n\r\n"
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write((head + form).encode())
            await writer.drain()
            return writer

        first = await ask("first")
        await until(lambda: worker.batches)
        impatient = [await ask(f"{i}") for i in range(8)]
        await until(lambda: batcher.queue.qsize() == 8)
        for writer in impatient:
            writer.close()
        patient = await ask("patient")
        await until(lambda: batcher.queue.qsize() == 9)
        await asyncio.sleep(0.2)  # in which the server hears of those that are gone
        worker.batches[0][1].set_result([Response("1")])
        await until(lambda: len(worker.batches) == 2)
        assert worker.batches[1][0] == ["patient"]
        worker.batches[1][1].set_result([Response("2")])
        for writer in (first, patient):
            writer.close()
        server.should_exit = server.force_exit = True
        await running

    asyncio.run(scenario())


def test_e64_a_model_that_cannot_be_loaded_again_is_tried_again(batcher, caplog):
    """Such as while its file is being replaced."""

    async def scenario() -> None:
        (worker,) = batcher.workers
        worker.process, worker.start = Mock(), Mock()
        async with batcher.running():
            answer = batcher.submit(by_name("x"))
            await until(lambda: worker.batches)
            worker.loaded = Future()
            worker.loaded.set_exception(InputError("checkpoint=a.ckpt: no such file"))
            worker.batches[0][1].set_exception(NameError("_model"))
            assert (await answer).status_code == 503
            worker.start.assert_called_once()

    asyncio.run(scenario())
    assert "cannot be loaded again: checkpoint=a.ckpt: no such file" in caplog.text


def test_a_fault_of_the_model_is_answered_without_a_word_of_it(batcher, caplog):
    async def scenario() -> None:
        (worker,) = batcher.workers
        async with batcher.running():
            answer = batcher.submit(by_name("x"))
            await until(lambda: worker.batches)
            worker.batches[0][1].set_exception(RuntimeError("/srv/secret"))
            assert (await answer).status_code == 500
            assert b"secret" not in (await answer).body
            again = batcher.submit(by_name("y"))
            await until(lambda: len(worker.batches) == 2)
            worker.batches[1][1].set_result([Response("fine")])
            assert (await again).body == b"fine"

    asyncio.run(scenario())
    assert "/srv/secret" in caplog.text


@pytest.mark.parametrize(
    ("way", "code"), [("while it waits", 499), ("in its body", 400), ("sends nothing", 408)]
)
def test_a_client_that_hangs_up_or_sends_nothing_leaves_no_request(batcher, way, code):
    async def scenario() -> None:
        events = {
            "while it waits": [{"type": "http.request", "body": b"x"}, {"type": "http.disconnect"}],
            "in its body": [
                {"type": "http.request", "body": b"x", "more_body": True},
                {"type": "http.disconnect"},
            ],
            "sends nothing": [],
        }[way]
        sent = []

        async def receive() -> dict:
            if not events:
                await asyncio.sleep(30)
            return events.pop(0)

        async def send(message: dict) -> None:
            sent.append(message)

        headers = [(b"content-type", b"image/png")]
        scope = {"type": "http", "method": "POST", "path": "/predict", "headers": headers}
        scope |= {"query_string": b"", "http_version": "1.1", "scheme": "http", "root_path": ""}
        answers = []
        submit = batcher.submit
        batcher.submit = lambda upload: answers.append(submit(upload)) or answers[-1]
        await create_app(batcher, {}, 1000)(scope, receive, send)
        assert sent[0]["status"] == code
        assert [answer.cancelled() for answer in answers] == [True] * (way == "while it waits")

    asyncio.run(scenario())


@pytest.mark.parametrize("name", ["SEG_TORCH_API_KEY", "LIT_SERVER_API_KEY"])
def test_with_a_key_nobody_is_answered_without_it(batcher, monkeypatch, name):
    monkeypatch.setenv(name, "secret")

    async def scenario() -> None:
        transport = httpx.ASGITransport(create_app(batcher, {}, 1000))
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            for path in ("/info", "/health"):
                assert (await client.get(path)).status_code == 401
                assert (await client.get(path, headers={"X-API-Key": "secre"})).status_code == 401
                assert (await client.get(path, headers={"X-API-Key": "secret"})).status_code == 200
            for path in ("/predict", "/view"):
                assert (await client.post(path, content=b"", headers=PNG)).status_code == 401

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("checkpoint={}/runs/monday", "monday"),
        ("checkpoint={}/runs/monday/checkpoints/best.ckpt", "monday"),
        ("checkpoint={}/model.onnx", "model.onnx"),
        ("checkpoint=hf://owner/name", "hf://owner/name"),
        ("model=hub model.name=owner/name", "owner/name"),
        ("model=hub model.name={}/runs", "runs"),
        ("model=fcn", "fcn"),
    ],
)
def test_a_model_is_called_without_folders_of_the_server(tmp_path, compose, given, name):
    (tmp_path / "runs/monday/checkpoints").mkdir(parents=True)
    for file in ("runs/monday/checkpoints/best.ckpt", "model.onnx"):
        (tmp_path / file).touch()
    assert public_name(compose("serve", *given.format(tmp_path).split())) == name


@pytest.mark.parametrize(
    ("kind", "chosen", "expected"),
    [
        ("cpu", "auto", ["cpu"]),
        ("cpu", 2, ["cpu"]),
        ("cuda", "auto", ["cuda:0", "cuda:1", "cuda:2"]),
        ("cuda", 2, ["cuda:0", "cuda:1"]),
        ("cuda", [2], ["cuda:2"]),
        ("mps", "auto", ["mps:0"]),
        ("cuda", 4, None),
        ("cuda", [3], None),
        ("cuda", 0, None),
        ("cuda", "all", None),
    ],
)
def test_devices_are_all_so_many_or_those_of_the_numbers(monkeypatch, kind, chosen, expected):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    if expected is None:
        with pytest.raises(InputError, match=f"trainer.devices={re.escape(str(chosen))}: "):
            _devices(kind, chosen)
    else:
        assert _devices(kind, chosen) == expected


def model_process(session: int) -> int:
    """The process that has the model."""
    for process in members(session):
        if is_model(process):
            return process
    return pytest.fail("there is none")


def is_model(process: int) -> bool:
    try:
        return b"--multiprocessing-fork" in Path(f"/proc/{process}/cmdline").read_bytes()
    except OSError:  # it has just ended
        return False


only_linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@only_linux
@pytest.mark.parametrize("when", ["at work", "idle"])
def test_e64_a_killed_model_process_is_replaced(server, when):
    process, client, segmenter = server

    def ask() -> httpx.Response:
        return client.post("/predict", content=encoded(photo(0)), headers=PNG)

    child = model_process(process.pid)
    with ThreadPoolExecutor(MAX_BATCH + 2) as pool:
        if when == "at work":
            os.kill(child, signal.SIGSTOP)
            answers = [pool.submit(ask) for _ in range(MAX_BATCH)]
            time.sleep(1)
            waiting = [pool.submit(ask) for _ in range(2)]
            time.sleep(0.5)
            assert not any(answer.done() for answer in (*answers, *waiting))
        os.kill(child, signal.SIGKILL)
        if when == "at work":
            for answer in (future.result(timeout=10) for future in answers):
                assert answer.status_code == 503
                assert "has ended" in answer.json()["detail"]
            assert client.get("/health").status_code == 503, "the model is being loaded"
            assert [future.result().status_code for future in waiting] == [200, 200]
        else:
            for _ in range(1200):  # nobody has to ask before the model is loaded again
                time.sleep(0.1)
                found = {p for p in members(process.pid) if p != child and is_model(p)}
                if found and client.get("/health").text == "ok":
                    break
            else:
                pytest.fail("there is no new process")
    answer = ask()
    assert answer.status_code == 200
    assert np.array(Image.open(BytesIO(answer.content))).tobytes() in possible(segmenter, photo(0))
    assert client.get("/health").text == "ok"
    assert model_process(process.pid) != child


def wait_until_none_is_left(session: int) -> None:
    for _ in range(200):
        if not (left := members(session)):
            return
        time.sleep(0.05)
    pytest.fail(f"{left} are left")


@only_linux
def test_kill_answers_what_is_under_way_and_leaves_no_process(server, stderr):
    """The last test of the server that the others use."""
    process, client, _ = server
    assert len(members(process.pid)) >= 2
    child = model_process(process.pid)
    os.kill(child, signal.SIGSTOP)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(client.post, "/predict", content=encoded(photo(0)), headers=PNG)
        time.sleep(1)
        os.killpg(process.pid, signal.SIGTERM)  # as systemd does it
        time.sleep(1)
        os.kill(child, signal.SIGCONT)
        assert answer.result().status_code == 200
    assert process.wait(timeout=60) == 0
    wait_until_none_is_left(process.pid)
    with pytest.raises(httpx.TransportError):
        client.get("/health")
    assert stderr.read_text() == ""


@only_linux
def test_a_killed_server_leaves_no_process(tmp_path):
    random_checkpoint(tmp_path / "random.ckpt")
    process = start(tmp_path, f"port={free_port()}")
    try:
        for _ in range(1200):
            if len(members(process.pid)) >= 3:
                break
            assert process.poll() is None, (tmp_path / "stderr").read_text()
            time.sleep(0.1)
        time.sleep(3)  # so that the model's process listens for the end of the first
    finally:
        process.kill()
        process.wait()
    for _ in range(30):
        time.sleep(1)
        if not members(process.pid):
            break
    wait_until_none_is_left(process.pid)
