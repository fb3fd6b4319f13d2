"""seg-torch app in a headless Chromium: what is on the page, and what leaves the machine."""

import contextlib
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from io import BytesIO
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
from conftest import ROOT, run_command
from PIL import Image
from predictions import bomb, random_checkpoint

from seg_torch import Segmenter
from seg_torch.commands.app import app
from seg_torch.errors import InputError
from seg_torch.images.read import read_image

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
SECONDS = 60  # longest wait for anything, on a machine with other work


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> list[Path]:
    """Two photos: real ones where there are some, else smooth noise."""
    if "SEG_TORCH_DATA" in os.environ:
        found = sorted(Path(os.environ["SEG_TORCH_DATA"], "camvid", "val").glob("*.png"))
        return [found[0], found[-1]]
    folder, generator = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for name, size in (("first.jpg", (320, 200)), ("second #2.png", (120, 200))):
        small = Image.fromarray(generator.integers(0, 256, (6, 6, 3), np.uint8))
        small.resize(size, Image.Resampling.BICUBIC).save(folder / name)
    return sorted(folder.iterdir())


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    return random_checkpoint(tmp_path_factory.mktemp("weights") / "random.ckpt")


@pytest.fixture(scope="module")
def segmenter(weights) -> Segmenter:
    return Segmenter.load(weights, device="cpu")


@pytest.fixture(scope="module")
def server(tmp_path_factory, weights):
    """The process, its address, its log, and its folder for temporary files."""
    folder = tmp_path_factory.mktemp("app")
    (folder / "tmp").mkdir()
    settings = [f"checkpoint={weights}", "trainer.accelerator=cpu", "max_megabytes=1"]
    settings.append("max_pixels=4000000")
    nowhere = dict.fromkeys(("http_proxy", "https_proxy"), "http://127.0.0.1:9")
    environment = {**os.environ, **nowhere, "TMPDIR": str(folder / "tmp"), "no_proxy": ""}
    environment["PYTHONPATH"] = str(ROOT)
    log = folder / "log"
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "seg_torch", "app", *settings],
            cwd=folder,
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    try:
        end = time.monotonic() + 10 * SECONDS
        while not (address := re.search(r"http://\S+", log.read_text())):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < end, "no address in time"
            time.sleep(0.1)
        yield process, address[0], log, folder / "tmp"
    finally:
        process.kill()
        process.wait(SECONDS)


@pytest.fixture(scope="module")
def chromium():
    if CHROMIUM is None:
        pytest.skip("Chromium is not installed: the web page is not tested")
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as api:
        browser = api.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(server, chromium):
    """`open_page()`: a page of a user of his own; in the end none has called another machine."""
    requests = []
    with contextlib.ExitStack() as stack:

        def open_page():
            context = chromium.new_context(viewport={"width": 1280, "height": 900})
            stack.callback(context.close)
            context.set_default_timeout(1000 * SECONDS)
            page = context.new_page()
            page.on("request", lambda request: requests.append(request.url))
            page.on("pageerror", lambda error: pytest.fail(str(error)))
            page.goto(server[1])
            return page

        yield open_page
    assert requests
    urls = [urlsplit(url) for url in requests]
    hosts = {url.hostname for url in urls if url.scheme not in ("data", "blob")}
    assert hosts == {"127.0.0.1"}


def upload(page, *files: Path) -> None:
    page.set_input_files("input[type=file]", [str(file) for file in files])
    page.locator(".about", has_text=files[0].name).wait_for()


def download(page, kind: str) -> bytes:
    with page.expect_download() as event:
        page.locator(".downloads a", has_text=kind).click()
    return Path(event.value.path()).read_bytes()


def screenshot(page, divider: int, shape: tuple[int, ...]) -> np.ndarray:
    """What is seen of the image, at its own size, RGB, uint8 [H, W, 3]."""
    page.locator(".divider").fill(str(divider))
    page.mouse.move(0, 0)
    shown = Image.open(BytesIO(page.locator(".stage").screenshot())).convert("RGB")
    return np.array(shown.resize(shape[1::-1], Image.Resampling.BOX))


def distance(a: np.ndarray, b: np.ndarray, columns: slice) -> float:
    return abs(a.astype(int) - b)[:, columns].mean()


def coloured(page) -> np.ndarray:
    """Where the overlay has a colour, bool [H, W]."""
    code = """canvas => [...canvas.getContext("2d").getImageData(
        0, 0, canvas.width, canvas.height).data.filter((_, i) => i % 4 === 3)]"""
    canvas = page.locator("canvas")
    shape = [int(canvas.get_attribute(side)) for side in ("height", "width")]
    return np.array(canvas.evaluate(code)).reshape(shape) == 255


def test_the_page_shows_and_gives_what_the_library_makes_of_an_image(
    open_page, photos, segmenter, tmp_path
):
    page = open_page()
    upload(page, photos[0])
    result = segmenter.predict(photos[0])
    assert len(np.unique(result.mask)) > 2, "nothing to compare"

    result.save(tmp_path, photos[0].stem, ["mask", "overlay", "polygons"])
    for kind, suffix in (("mask", "png"), ("overlay", "jpg"), ("polygons", "geojson")):
        expected = (tmp_path / kind / f"{photos[0].stem}.{suffix}").read_bytes()
        assert download(page, kind) == expected, kind

    image, overlay = read_image(photos[0]), np.array(result.overlay())
    half, edge = image.shape[1] // 2, image.shape[1] // 20  # the handle hides what is beside it
    left, right, all_of_it = slice(edge, half - edge), slice(half + edge, -edge), slice(edge, -edge)
    for divider, columns, expected, other in (
        (0, all_of_it, overlay, image),
        (100, all_of_it, image, overlay),
        (50, left, image, overlay),
        (50, right, overlay, image),
    ):
        shown = screenshot(page, divider, image.shape)
        assert distance(shown, expected, columns) < distance(shown, other, columns) / 4, divider
    page.locator(".opacity input").fill("0")
    shown = screenshot(page, 0, image.shape)
    assert distance(shown, image, all_of_it) < distance(shown, overlay, all_of_it) / 4


def test_the_legend_has_the_shares_and_a_click_shows_a_class_alone(open_page, photos, segmenter):
    page = open_page()
    upload(page, photos[0])
    result = segmenter.predict(photos[0])
    buttons = page.locator(".legend button")
    areas = {name: share for name, share in result.areas().items() if share}
    order = sorted(areas, key=areas.get, reverse=True)
    assert [text.split("\n") for text in buttons.all_inner_texts()] == [
        *([name, f"{100 * areas[name]:.1f} %"] for name in order),
        ["all classes"],
    ]
    for name in order:
        i = result.labels.names.index(name)
        style = page.locator(".legend button", has_text=name).locator("i").get_attribute("style")
        assert [int(n) for n in re.findall(r"\d+", style)] == result.labels.palette[i].tolist()
    assert coloured(page).all()
    chosen = result.mask == result.labels.names.index(order[1])
    buttons.nth(1).click()
    assert np.array_equal(coloured(page), chosen)
    buttons.nth(1).click()
    assert coloured(page).all()
    buttons.nth(1).click()
    buttons.last.click()
    assert coloured(page).all()


def test_the_class_and_its_probability_are_at_the_cursor(open_page, photos, segmenter):
    page = open_page()
    upload(page, photos[0])
    result = segmenter.predict(photos[0], confidence_map=True)
    box = page.locator("canvas").bounding_box()
    scale = box["width"] / result.mask.shape[1]
    assert page.locator(".probe").is_hidden()
    for x, y in ((5, 3), (90, 150), (200, 20)):
        page.mouse.move(box["x"] + (x + 0.5) * scale, box["y"] + (y + 0.5) * scale)
        name = result.labels.names[result.mask[y, x]]
        confidence = round(100 * int(result.confidence_map[y, x]) / 255)
        assert page.locator(".probe").inner_text() == f"{name} {confidence} %"
    page.mouse.move(0, 0)
    assert page.locator(".probe").is_hidden()


def test_of_several_files_the_good_ones_are_shown_and_the_others_named(
    open_page, photos, segmenter, server, tmp_path
):
    (tmp_path / "text.jpg").write_text("no image")
    bomb(tmp_path / "bomb.png")
    page = open_page()
    upload(page, photos[0], tmp_path / "text.jpg", tmp_path / "bomb.png", photos[1])
    gallery = page.locator(".gallery button")
    gallery.nth(1).wait_for()
    assert gallery.all_inner_texts() == [photo.name for photo in photos]
    messages = page.locator(".toast-body")
    messages.filter(has_text="bomb.png").wait_for()  # Gradio puts several into one
    text = " ".join(messages.all_inner_texts())
    assert "text.jpg: cannot be read as an image: it is in no format that Pillow knows" in text
    assert re.search(r"bomb.png: .*400000000 pixels.*max_pixels", text)
    assert str(server[3]) not in text, "names of folders are no business of the user"

    gallery.nth(1).click()
    page.locator(".about", has_text=photos[1].name).wait_for()
    mask = np.array(Image.open(BytesIO(download(page, "mask"))))
    assert np.array_equal(mask, segmenter.predict(photos[1]).mask)


def test_a_file_above_the_limit_is_refused(open_page, tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (700, 700, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "large.png")
    assert (tmp_path / "large.png").stat().st_size > 1_000_000
    page = open_page()
    page.set_input_files("input[type=file]", str(tmp_path / "large.png"))
    page.locator(".toast-body", has_text="size").wait_for()


def test_two_users_at_once_see_their_own_images(open_page, photos, segmenter):
    pages = [open_page(), open_page()]
    for page, photo in zip(pages, photos, strict=True):
        page.set_input_files("input[type=file]", str(photo))
    for page, photo in zip(pages, photos, strict=True):
        page.locator(".about", has_text=photo.name).wait_for()
        mask = np.array(Image.open(BytesIO(download(page, "mask"))))
        assert np.array_equal(mask, segmenter.predict(photo).mask)


def test_a_port_that_is_taken_is_named_before_the_model_is_loaded(server, compose):
    port = urlsplit(server[1]).port
    with pytest.raises(InputError, match=f"port={port}: .*use another"):
        app(compose("app", f"port={port}", "checkpoint=nowhere.ckpt"))


def test_ctrl_c_ends_it_and_leaves_no_uploads(server):
    """The last test of the server that all use."""
    process, address, log, folder = server
    assert urlsplit(address).hostname == "127.0.0.1"
    assert any(folder.rglob("*")), "nothing to be removed"
    process.send_signal(signal.SIGINT)
    assert process.wait(SECONDS) == 130
    assert "Traceback" not in log.read_text()
    assert list(folder.iterdir()) == []


def test_without_gradio_the_command_says_what_to_install(tmp_path, capsys, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "gradio" else find_spec(name)
    )
    monkeypatch.setitem(sys.modules, "seg_torch.commands.app", None)  # nor is it imported
    assert run_command("app", tmp_path) == 2
    assert "pip install 'segwright[app]'" in capsys.readouterr().err
