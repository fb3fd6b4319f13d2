"""The page, as seg-torch app gives it, in a headless Chromium; what leaves the machine."""

import base64
import contextlib
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import webbrowser
from io import BytesIO
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
from conftest import ROOT, run_command
from PIL import Image
from predictions import bomb, random_checkpoint
from scipy.ndimage import maximum_filter, minimum_filter

from seg_torch import Segmenter
from seg_torch.commands.app import app
from seg_torch.errors import InputError
from seg_torch.images.read import read_image
from seg_torch.serving import server as server_module

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
    settings += ["max_pixels=4000000", "browser=false"]
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

        def open_page(**settings):
            settings = {"viewport": {"width": 1280, "height": 900}, **settings}
            context = chromium.new_context(**settings)
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


def state(page, file: Path | str) -> str:
    """What the list of images says of one."""
    card = page.locator(".gallery li", has_text=getattr(file, "name", file))
    return card.locator(".state").inner_text()


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


PHONE = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}


# What a model makes of a photo, in a process that has done nothing else, as the server's.
PREDICT = """
import sys
import numpy as np
from seg_torch import Segmenter
result = Segmenter.load(sys.argv[1], "cpu").predict(sys.argv[2], confidence_map=True)
np.savez(sys.argv[3], mask=result.mask, confidence=result.confidence_map)
"""


def test_e66_a_tap_shows_the_class_and_its_probability(
    open_page, photos, segmenter, weights, tmp_path
):
    page = open_page(**PHONE)
    upload(page, photos[0])
    arguments = [weights, photos[0], tmp_path / "result.npz"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", PREDICT, *arguments], check=True, env=environment)
    result = np.load(tmp_path / "result.npz")
    mask, percent = result["mask"], result["confidence"] * (100 / 255)
    scale = page.locator("canvas").bounding_box()["width"] / mask.shape[1]
    clip = page.locator("canvas").evaluate("canvas => canvas.style.clipPath")
    # Browsers round where a finger is, so pixels are tapped whose neighbours are like them.
    changes = maximum_filter(percent, 3) - minimum_filter(percent, 3)
    changes[maximum_filter(mask, 3) != minimum_filter(mask, 3)] = 100
    changes[:10], changes[-10:] = 100, 100
    middle = mask.shape[1] // 2
    for left, right in ((10, middle), (middle, mask.shape[1] - 10)):
        y, x = divmod(int(changes[:, left:right].argmin()), right - left)
        x += left
        assert changes[y, x] < 1
        name = segmenter.labels.names[mask[y, x]]
        confidence = round(percent[y, x])
        # The server may have other threads, which round a half the other way.
        near = "|".join(str(confidence + step) for step in (-1, 0, 1))
        shown = page.locator(".probe", has_text=re.compile(f"{name} ({near}) %"))
        for _ in range(20):  # on a busy machine the page may still be laid out under the finger
            box = page.locator("canvas").bounding_box()
            page.touchscreen.tap(box["x"] + (x + 0.5) * scale, box["y"] + (y + 0.5) * scale)
            page.wait_for_timeout(500)
            if shown.is_visible():
                break
        assert shown.is_visible(), page.locator(".probe").inner_text()
        spot = page.locator(".spot").bounding_box()
        assert spot["x"] + spot["width"] / 2 == pytest.approx(box["x"] + (x + 0.5) * scale, abs=1)
    assert page.locator("canvas").evaluate("canvas => canvas.style.clipPath") == clip
    right = page.evaluate("document.documentElement.scrollWidth")
    assert right == 390, "nothing is cut off, nothing has to be moved sideways"


def clip(page) -> float:
    """The part of the image that is input, in per cent."""
    return float(re.search(r"([\d.]+)%", page.locator("canvas").get_attribute("style"))[1])


def test_e66_arrow_keys_move_the_line_by_a_hundredth_and_the_mouse_to_where_it_is(
    open_page, photos
):
    page = open_page()
    upload(page, photos[0])
    page.locator(".divider").focus()
    assert clip(page) == pytest.approx(50, abs=0.1)
    for key, part in (("ArrowRight", 51), ("ArrowRight", 52), ("ArrowLeft", 51), ("Home", 0)):
        page.keyboard.press(key)
        assert clip(page) == pytest.approx(part, abs=0.1)
        assert page.locator(".divider").get_attribute("aria-valuetext") == f"{part} % input"
    box = page.locator("canvas").bounding_box()
    page.mouse.move(box["x"] + 0.3 * box["width"], box["y"] + 50)
    assert clip(page) == 0, "nothing is pressed"
    page.mouse.down()
    assert clip(page) == pytest.approx(30, abs=0.3)
    page.mouse.move(box["x"] + 0.8123 * box["width"], box["y"] + 60)
    page.mouse.up()
    assert clip(page) == pytest.approx(81.23, abs=0.3)


@pytest.mark.parametrize("phone", [False, True])
@pytest.mark.parametrize("size", [(3000, 40), (40, 3000)])
def test_e66_panoramas_and_towers_can_be_looked_at(open_page, segmenter, tmp_path, size, phone):
    small = np.random.default_rng(1).integers(0, 256, (30, 30, 3), np.uint8)
    Image.fromarray(small).resize(size, Image.Resampling.BICUBIC).save(tmp_path / "long.png")
    page = open_page(**(PHONE if phone else {}))
    upload(page, tmp_path / "long.png")
    page.locator(".about", has_text="scroll to see all of it").wait_for()
    box = page.locator(".stage").bounding_box()
    assert min(box["width"], box["height"]) >= 150
    seen = page.locator(".scroll").bounding_box()
    assert seen["width"] <= page.viewport_size["width"]
    assert seen["height"] <= 0.8 * page.viewport_size["height"]
    # At the far end the line is still in the middle of what is seen, and the class is right.
    page.locator(".scroll").evaluate("s => s.scrollTo(s.scrollWidth, s.scrollHeight)")
    page.wait_for_timeout(200)
    handle = page.locator(".handle").bounding_box()
    middle = seen["x"] + seen["width"] / 2
    assert handle["x"] + handle["width"] / 2 == pytest.approx(middle, abs=10)
    stage = page.locator(".stage").bounding_box()
    where = stage["x"] + clip(page) / 100 * stage["width"]
    assert where == pytest.approx(middle, abs=10), "the overlay begins at the line"
    result = segmenter.predict(tmp_path / "long.png")
    x, y = size[0] - 12, size[1] - 12
    scale = stage["width"] / size[0]
    point = stage["x"] + (x + 0.5) * scale, stage["y"] + (y + 0.5) * scale
    (page.touchscreen.tap if phone else page.mouse.move)(*point)
    page.locator(".probe", has_text=result.labels.names[result.mask[y, x]]).wait_for()


def test_e66_the_empty_page_says_what_the_model_finds_and_what_it_takes(
    open_page, server, segmenter
):
    page = open_page()
    page.locator(".classes li").first.wait_for()
    assert page.locator(".classes li").all_inner_texts() == list(segmenter.labels.names)
    colours = page.locator(".classes i").evaluate_all("all => all.map(i => i.style.background)")
    expected = [f"rgb({r}, {g}, {b})" for r, g, b in segmenter.labels.palette.tolist()]
    assert colours == expected
    takes = page.locator(".takes").inner_text()
    assert re.search(r"JPEG.*PNG.*TIFF.*, up to 1 MB and 4 megapixels", takes)
    assert page.locator(".model").inner_text() == "random.ckpt, 4 classes"
    assert "/" not in page.locator(".model").inner_text() + page.title(), "no path of the server"


def test_e66_something_moves_while_an_image_is_worked_on(open_page, photos):
    page = open_page()
    held = []
    page.route("**/view", lambda route: held.append(route))
    page.set_input_files("input[type=file]", [str(photo) for photo in photos])
    page.locator(".pending progress").wait_for()
    moving = "() => document.getAnimations().some(a => a.playState === 'running')"
    assert page.evaluate(moving)
    page.locator(".pending .what", has_text=f"{photos[0].name}: segmenting, 1 s").wait_for()
    page.locator(".pending .what", has_text=f"{photos[0].name}: segmenting, 2 s").wait_for()
    assert state(page, photos[0]).startswith("segmenting, ")
    assert state(page, photos[1]) == "waiting"
    assert len(held) == 1, "one image of a user at a time"
    held[0].continue_()
    page.unroute("**/view")
    page.locator(".about", has_text=photos[0].name).wait_for()
    assert page.locator(".pending").is_hidden()
    assert re.fullmatch(r"\d+ . \d+", state(page, photos[0]))


def test_e66_of_several_files_the_good_ones_are_shown_and_the_others_stay_marked(
    open_page, photos, segmenter, server, tmp_path
):
    (tmp_path / "text.jpg").write_text("no image")
    bomb(tmp_path / "bomb.png")
    page = open_page()
    upload(page, photos[0], tmp_path / "text.jpg", tmp_path / "bomb.png", photos[1])
    page.locator(".is-done").nth(1).wait_for()
    names = page.locator(".gallery .name").all_inner_texts()
    assert names == [photos[0].name, "text.jpg", "bomb.png", photos[1].name]
    texts = []
    for name in ("text.jpg", "bomb.png"):
        page.locator(".choose", has_text=name).click()
        texts.append(page.locator(".failed .why").inner_text())
        assert page.locator(".view").is_hidden()
    assert "text.jpg: cannot be read as an image: it is in no format that Pillow knows" in texts[0]
    assert texts[1] == "the image has 400,000,000 pixels; the limit is 4,000,000 (max_pixels)"
    assert str(server[3]) not in " ".join(texts), "names of folders are no business of the user"

    page.locator(".choose", has_text=photos[1].name).click()
    page.locator(".about", has_text=photos[1].name).wait_for()
    mask = np.array(Image.open(BytesIO(download(page, "mask"))))
    assert np.array_equal(mask, segmenter.predict(photos[1]).mask)
    assert page.locator(".failed").is_hidden()
    assert [state(page, name) for name in ("text.jpg", "bomb.png")] == ["failed", "failed"]


def test_a_file_above_the_limit_is_refused_before_it_is_sent(open_page, tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (700, 700, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "large.png")
    assert (tmp_path / "large.png").stat().st_size > 1_000_000
    page = open_page()
    page.route("**/view", lambda route: pytest.fail("it is sent"))
    page.set_input_files("input[type=file]", str(tmp_path / "large.png"))
    page.locator(".why", has_text="large.png: 1.5 MB; the limit is 1 MB").wait_for()


def test_what_failed_can_be_tried_again_and_any_image_taken_off(open_page, photos):
    page = open_page()
    page.route("**/view", lambda route: route.abort())
    page.set_input_files("input[type=file]", [str(photo) for photo in photos])
    page.locator(".is-failed").nth(1).wait_for()
    assert page.locator(".why").inner_text() == "the server cannot be reached"
    page.unroute("**/view")
    page.locator(".again").click()
    page.locator(".about", has_text=photos[0].name).wait_for()
    assert state(page, photos[1]) == "failed"

    page.get_by_role("button", name=f"remove {photos[0].name}").click()
    page.locator(".why").wait_for()
    assert page.locator(".gallery .name").all_inner_texts() == [photos[1].name]
    page.get_by_role("button", name=f"remove {photos[1].name}").click()
    page.locator(".classes").wait_for()
    assert page.locator(".invitation").is_visible()

    held = []
    page.route("**/view", lambda route: held.append(route))
    with page.expect_event("requestfailed"):  # it is not waited for any longer
        page.set_input_files("input[type=file]", str(photos[0]))
        page.locator(".is-working").wait_for()
        page.get_by_role("button", name=f"remove {photos[0].name}").click()
    assert page.locator(".gallery li").count() == 0


def test_files_can_be_dropped_anywhere(open_page, photos):
    page = open_page()
    page.locator(".classes li").first.wait_for()
    content = base64.b64encode(photos[0].read_bytes()).decode()
    page.evaluate(
        """([name, content]) => {
            const bytes = Uint8Array.from(atob(content), c => c.charCodeAt(0));
            const dataTransfer = new DataTransfer();
            dataTransfer.items.add(new File([bytes], name));
            const settings = {dataTransfer, bubbles: true, cancelable: true};
            document.body.dispatchEvent(new DragEvent("drop", settings));
        }""",
        [photos[0].name, content],
    )
    page.locator(".about", has_text=photos[0].name).wait_for()


def test_everything_has_a_name_and_is_reached_by_the_keyboard(open_page, photos):
    page = open_page()
    upload(page, *photos)
    page.locator(".is-done").nth(1).wait_for()
    reached = set()
    page.locator(".drop input").focus()
    code = "() => document.activeElement.closest('[class]').className || 'drop'"
    for _ in range(30):
        reached.add(page.evaluate(code))
        page.keyboard.press("Tab")
    assert {"drop", "choose", "remove", "divider", "opacity", "legend", "downloads"} <= reached
    nameless = page.locator("button, input, a").evaluate_all(
        """all => all.filter(e => !(e.ariaLabel || e.textContent.trim() || e.labels?.length)
            ).map(e => e.outerHTML)"""
    )
    assert nameless == []
    assert "is segmented" in page.locator("[role=status]").inner_text()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_is_as_light_as_the_system(open_page, scheme):
    page = open_page(color_scheme=scheme)
    style = "e => [getComputedStyle(e).backgroundColor, getComputedStyle(e).color]"
    colours = page.locator("body").evaluate(style)
    back, text = (sum(map(int, re.findall(r"\d+", colour)[:3])) / 3 for colour in colours)
    assert (back > 200 and text < 60) if scheme == "light" else (back < 60 and text > 200)


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


def test_the_browser_is_opened_where_there_is_a_screen(compose, monkeypatch):
    opened = []
    monkeypatch.setattr(webbrowser, "open", opened.append)
    monkeypatch.setattr(server_module, "run", lambda cfg, listening, ready: ready("http://x"))
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    monkeypatch.delenv("DISPLAY", raising=False)
    app(compose("app"))
    assert opened == []
    monkeypatch.setenv("DISPLAY", ":0")
    app(compose("app", "browser=false"))
    assert opened == []
    app(compose("app"))
    assert opened == ["http://x"]


def test_ctrl_c_ends_it_and_no_uploads_were_left(server):
    """The last test of the server that all use."""
    process, address, log, folder = server
    assert urlsplit(address).hostname == "127.0.0.1"
    assert list(folder.iterdir()) == []
    process.send_signal(signal.SIGINT)
    assert process.wait(SECONDS) == 130
    assert "Traceback" not in log.read_text()
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("command", ["app", "serve"])
def test_without_its_packages_the_command_says_what_to_install(
    tmp_path, capsys, monkeypatch, command
):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "fastapi" else find_spec(name)
    )
    # Nor is it imported.
    monkeypatch.setitem(sys.modules, f"seg_torch.commands.{command}", None)
    assert run_command(command, tmp_path) == 2
    assert f"pip install -e '{ROOT}[{command}]'" in capsys.readouterr().err
