"""seg-torch report: one file, with what evaluate finds, and the images that it should show."""

import base64
import io
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import scipy.special
import torch
from conftest import SMALL_DATA, SMALL_TRAINER, SMALL_UNET, run_command
from PIL import Image
from sklearn.metrics import jaccard_score

from seg_torch.datasets import shapes, write_folder
from seg_torch.labels import Labels
from seg_torch.prediction.segmenter import Segmenter

IMAGES = 12  # of the test split
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


class Page(HTMLParser):
    """Texts, captions and images of a page; what would need a network or another file fails."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.texts: list[str] = []
        self.images: list[tuple[str, bytes]] = []
        self.open: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list) -> None:
        assert tag not in ("link", "iframe", "b")
        if tag not in ("meta", "img"):
            self.open.append(tag)
        for key, value in attributes:
            assert key not in ("href", "srcset", "onload")
            if key == "src":
                kind, content = value.split(",")
                assert kind in ("data:image/jpeg;base64", "data:image/svg+xml;base64")
                self.images.append((kind, base64.b64decode(content, validate=True)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def captions(self, section: str) -> list[str]:
        """The names of the images of a section."""
        after = self.texts[self.texts.index(section) + 1 :]
        end = next((i for i, text in enumerate(after) if text in HEADINGS), len(after))
        return [t.split(": mean IoU")[0] for t in after[:end] if ": mean IoU" in t]


HEADINGS = (
    *("Scores", "Classes", "Confusion matrix", "Reliability", "Training", "Worst images"),
    *("Best images", "Labels most likely to be wrong", "Versions and settings"),
)


@pytest.fixture(scope="module")
def samples() -> list:
    """Twelve images; three have wrong labels in a corner, one has no labels at all."""
    dataset = shapes("test", size=48, test=IMAGES)
    samples = [dataset[i] for i in range(IMAGES)]
    for i in (2, 5, 7):
        samples[i][1][:16, :16] = 5
    samples[9][1][:] = 255
    return samples


@pytest.fixture(scope="module")
def folder(tmp_path_factory, samples) -> Path:
    """Holds `run`, its data, and `report`."""
    folder = tmp_path_factory.mktemp("report")
    names = ("background", "<script>alert(1)</script>", "square & co", "triangle", "star", "ring")
    others = [shapes(split, size=48)[i] for split in ("train", "val") for i in range(4)]
    labels = Labels(names, shapes("test").labels.palette)
    write_folder([*samples, *others], labels, folder / "data")
    for split, first, last in (("test", 0, 12), ("train", 12, 16), ("val", 16, 20)):
        listed = "\n".join(f"{i:04d}" for i in range(first, last))
        (folder / f"data/{split}.txt").write_text(listed)
    options = (
        "data=folder",
        f"data.root={folder / 'data'}",
        "data.augment=null",
        "optimizer.lr=0.01",
    )
    small = [o for o in (*SMALL_DATA, *SMALL_TRAINER, *SMALL_UNET) if "dataset" not in o]
    line = " ".join(["train", *options, "model=unet_random", *small, "output_dir=run"])
    assert run_command(f"{line} trainer.max_epochs=4", folder) == 0
    assert run_command("report run output_dir=report trainer.accelerator=cpu", folder) == 0
    return folder


@pytest.fixture(scope="module")
def page(folder) -> Page:
    return Page((folder / "report/report.html").read_text(encoding="utf-8"))


def test_the_report_is_one_small_file_beside_the_scores_that_evaluate_finds(folder, page):
    assert (folder / "report/report.html").stat().st_size < 1 << 20
    text = (folder / "report/report.html").read_text(encoding="utf-8")
    assert "http" not in text
    assert text.count("<script>") == 1
    assert set(HEADINGS) - {"Reliability"} <= set(page.texts)
    assert (
        run_command("evaluate checkpoint=run output_dir=scores trainer.accelerator=cpu", folder)
        == 0
    )
    found, expected = (
        json.loads((folder / name / "test_metrics.json").read_text())
        for name in ("report", "scores")
    )
    assert found == expected
    for name in ("mean_iou", "pixel_accuracy", "mean_dice", "mean_accuracy"):
        assert f"{expected[name]:.4f}" in page.texts
    for name, row in expected["per_class"].items():
        assert name in page.texts, "escaped"
        assert f"{row['pixels']:,}" in page.texts
    assert "max_epochs: 4" in "".join(page.texts), "the configuration"


def test_each_image_is_shown_with_its_label_its_prediction_and_its_errors(folder, page, samples):
    segmenter = Segmenter.load(folder / "run", device="cpu", precision="32-true")
    photos = [
        np.asarray(Image.open(io.BytesIO(c)).convert("RGB")) for k, c in page.images if "jpeg" in k
    ]
    captions = [name for section in HEADINGS[5:8] for name in page.captions(section)]
    assert len(captions) == 6 + 3 + 6
    assert len(photos) == 4 * len(captions)
    colours = shapes("test").labels.palette.astype(int)
    for place, name in enumerate(captions):
        image, label = samples[int(name)]
        shown, label_shown, prediction_shown, errors = photos[4 * place : 4 * place + 4]
        image, label = image.permute(1, 2, 0).numpy().astype(int), label.numpy()
        assert np.abs(shown - image).mean() < 14, "JPEG"
        prediction = segmenter.predict(image.astype(np.uint8)).mask
        wrong = (prediction != label) & (label != 255)
        red = 0.3 * image + 0.7 * np.array([255, 0, 0])
        expected = np.where(wrong[..., None], red, image)
        assert np.abs(errors - expected).mean() < 14
        assert np.abs(prediction_shown - colours[prediction]).mean() < 14
        labelled = label != 255
        if labelled.any():
            assert np.abs(label_shown - colours[label * labelled])[labelled].mean() < 14


def test_the_worst_and_best_images_are_those_by_mean_iou_of_their_classes(folder, page, samples):
    segmenter = Segmenter.load(folder / "run", device="cpu", precision="32-true")
    scores = {}
    for i, (image, mask) in enumerate(samples):
        valid = mask.numpy() != 255
        label, prediction = mask.numpy()[valid], segmenter.predict(image).mask[valid]
        if valid.any():
            scores[f"{i:04d}"] = jaccard_score(label, prediction, average="macro")
    order = sorted(scores, key=scores.__getitem__)
    assert len(order) == IMAGES - 1, "one is not labelled"
    assert page.captions("Worst images") == order[:6]
    assert page.captions("Best images") == order[-3:][::-1]


def test_doubtful_labels_are_those_of_the_lowest_softmin_score(folder, page, samples):
    segmenter = Segmenter.load(folder / "run", device="cpu", precision="32-true")
    scores = {}
    for i, (image, mask) in enumerate(samples):
        label = mask.numpy()
        valid = label != 255
        if valid.any():
            probabilities = segmenter.predict(image, probabilities=True).probabilities()
            s = np.take_along_axis(probabilities, label[None] * valid, 0)[0][valid].astype(float)
            scores[f"{i:04d}"] = s @ scipy.special.softmax((1 - s) / 0.1)
    assert page.captions("Labels most likely to be wrong") == sorted(scores, key=scores.get)[:6]


def test_a_checkpoint_without_its_run_is_read_once_and_has_a_report_without_its_training(
    folder, tmp_path, monkeypatch
):
    shutil.copy(folder / "run/checkpoints/best.ckpt", tmp_path / "best.ckpt")
    reads, load = [], torch.load
    monkeypatch.setattr(torch, "load", lambda *a, **k: reads.append(str(a[0])) or load(*a, **k))
    line = "report best.ckpt split=val output_dir=report trainer.accelerator=cpu"
    assert run_command(line, tmp_path) == 0
    assert len(reads) == 1
    page = Page((tmp_path / "report/report.html").read_text(encoding="utf-8"))
    assert "Training" not in page.texts
    assert "Best images" not in page.texts, "all four are among the worst"
    assert "_target_: seg_torch.models.unet" in "".join(page.texts)


@pytest.mark.slow
def test_a_click_sorts_a_table_in_a_browser(folder, tmp_path):
    browser = shutil.which("chromium") or pytest.skip("needs chromium")
    text = (folder / "report/report.html").read_text(encoding="utf-8")
    click = (
        "<script>document.querySelectorAll('table')[1].querySelectorAll('th')[6].click()</script>"
    )
    (tmp_path / "page.html").write_text(text.replace("</body>", f"{click}</body>"))
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    command = [browser, *options, f"file://{tmp_path}/page.html"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    rows = re.findall(r"<tr>(.*?)</tr>", result.stdout.split("<h2>Classes</h2>")[1], re.DOTALL)
    pixels = [int(re.findall(r"<td>([\d,]+)</td>", row)[-1].replace(",", "")) for row in rows[1:7]]
    assert pixels == sorted(pixels, reverse=True)
    assert pixels != sorted(pixels)


def test_e22_what_was_not_scored_is_not_counted(folder, capsys):
    line = "report run output_dir=part trainer.accelerator=cpu data.eval_batch_size=1"
    assert run_command(f"{line} trainer.limit_test_batches=1", folder) == 0
    assert "1 of 12 images of test" in capsys.readouterr().out
    arrays = np.load(folder / "part/test_images.npz")
    assert arrays["names"].tolist() == ["0000"]
    assert (arrays["label_pixels"].sum(1) > 0).all()
    assert len((folder / "part/test_images.csv").read_text().splitlines()) == 1 + 1
    part = Page((folder / "part/report.html").read_text(encoding="utf-8"))
    assert any("on 1 of 12 images of test." in text for text in part.texts)
    assert part.captions("Labels most likely to be wrong") == ["0000"]
    # A class that is not in this image has no score, which is not one of 0.
    scores = json.loads((folder / "part/test_metrics.json").read_text())
    columns = ("iou", "dice", "accuracy", "precision")
    undefined = [row[c] for row in scores["per_class"].values() for c in columns].count(None)
    assert undefined > 0
    assert part.texts.count("absent") == undefined


@pytest.mark.parametrize("split", ["test", "val"])
def test_e49_scores_of_val_that_stands_in_for_test_say_so(folder, split, capsys):
    data = folder / f"without_test_{split}"
    shutil.copytree(folder / "data", data)
    (data / "test.txt").unlink()
    line = f"report run split={split} output_dir=of_{split} trainer.accelerator=cpu"
    assert run_command(f"{line} data.root={data}", folder) == 0
    scores = json.loads((folder / f"of_{split}/{split}_metrics.json").read_text())
    assert (scores["split"], scores["images"], scores["images_of_split"]) == ("val", 4, 4)
    remark = ": there are none of test" if split == "test" else ""
    assert f"4 images of val{remark}\n" in re.sub(" *\n", "\n", capsys.readouterr().out)
    of_val = Page((folder / f"of_{split}/report.html").read_text(encoding="utf-8"))
    assert any(text.endswith(f" on 4 images of val{remark}.") for text in of_val.texts)


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_e65_the_report_fits_a_phone_and_its_charts_are_dark_in_dark_mode(folder):
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        for scheme in ("light", "dark"):
            view = browser.new_page(viewport={"width": 390, "height": 800}, color_scheme=scheme)
            view.goto((folder / "report/report.html").as_uri())
            assert view.evaluate("document.documentElement.scrollWidth") == 390
            plots = view.locator("img.plot")
            assert plots.count() == 3
            for i in range(3):
                box = plots.nth(i).bounding_box()
                assert box["x"] + box["width"] <= 390
                shown = Image.open(io.BytesIO(plots.nth(i).screenshot())).convert("L")
                background = int(np.median(np.asarray(shown)[:3]))
                assert background > 250 if scheme == "light" else background < 50
        browser.close()
