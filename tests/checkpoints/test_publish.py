"""Models of seg_torch on the Hugging Face Hub: written, uploaded, downloaded, never trusted.

The Hub is a small server here, which implements the calls that huggingface_hub makes of it.
"""

import base64
import hashlib
import json
import re
import shutil
import socket
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import huggingface_hub.constants
import numpy as np
import pytest
import torch
import yaml
from conftest import SMALL_DATA, SMALL_TRAINER, SMALL_UNET, run_command
from models_for_tests import caches, published_mobilenet  # noqa: F401
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from seg_torch import Segmenter
from seg_torch.checkpoints import checkpoint
from seg_torch.errors import InputError
from seg_torch.labels import Labels
from seg_torch.models.network import Network
from seg_torch.version import REPOSITORY

TOKEN = "hf_secret"
ON_CPU = "trainer.accelerator=cpu trainer.precision=32-true"
LABELS = Labels(("road", "left | right `lane`"), np.array([[1, 2, 3], [200, 100, 255]]))


class Tiny(nn.Module):
    """Somebody's own model."""

    def __init__(self, num_classes: int, **_: object) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, num_classes, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


class FakeHub(ThreadingHTTPServer):
    """Repositories of models, each a list of commits, in memory."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Calls)
        self.commits: dict[str, list[tuple[str, dict[str, bytes]]]] = {}
        self.private: set[str] = set()
        self.gated: set[str] = set()
        self.downloads: list[str] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def commit(self, name: str, files: dict[str, bytes]) -> str:
        history = self.commits.setdefault(name, [("0" * 40, {})])
        revision = hashlib.sha1(repr((len(history), sorted(files))).encode()).hexdigest()
        history.append((revision, {**history[-1][1], **files}))
        return revision

    def find(self, name: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        by_commit = {**dict(self.commits[name]), "main": self.commits[name][-1][1]}
        if revision not in by_commit:
            return None
        commit = self.commits[name][-1][0] if revision == "main" else revision
        return commit, by_commit[revision]


class Calls(BaseHTTPRequestHandler):
    """The calls that huggingface_hub makes to upload a folder and to download a file."""

    server: FakeHub

    def log_message(self, *_: object) -> None:
        pass

    def answer(self, status: int, content: object = None, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content or {}).encode()
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_POST(self) -> None:
        hub, body = self.server, self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.path == "/api/validate-yaml":
            self.answer(200, {"errors": [], "warnings": []})
        elif self.headers.get("authorization") != f"Bearer {TOKEN}":
            self.answer(401, {"error": "Invalid credentials"})
        elif self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            if asked["organization"] != "owner":
                return self.answer(403, {"error": "no rights in this namespace"})
            if asked.get("visibility") == "private" or asked.get("private"):
                hub.private.add(name)
            known = name in hub.commits
            hub.commits.setdefault(name, [("0" * 40, {})])
            self.answer(409 if known else 200, {"url": f"{hub.address}/{name}"})
        elif "/preupload/" in self.path:
            files = [file["path"] for file in json.loads(body)["files"]]
            modes = {"uploadMode": "regular", "shouldIgnore": False}
            self.answer(200, {"files": [{"path": path, **modes} for path in files]})
        elif "/commit/" in self.path:
            name = "/".join(self.path.split("/")[3:5])
            lines = [json.loads(line) for line in body.splitlines()]
            files = {
                line["value"]["path"]: base64.b64decode(line["value"]["content"])
                for line in lines
                if line["key"] == "file"
            }
            commit = hub.commit(name, files)
            self.answer(200, {"commitUrl": f"{hub.address}/{name}/commit/x", "commitOid": commit})
        else:
            self.answer(404)

    def do_GET(self) -> None:
        hub, parts = self.server, self.path.split("?")[0].strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            parts, revision, file = parts[2:], (*parts[5:6], "main")[0], None
        elif parts[2:3] == ["resolve"]:
            revision, file = parts[3], "/".join(parts[4:])
        else:
            return self.answer(404)
        name = "/".join(parts[:2])
        allowed = self.headers.get("authorization") == f"Bearer {TOKEN}"
        if name not in hub.commits or (name in hub.private and not allowed):
            return self.answer(401, X_Error_Code="RepoNotFound")
        found = hub.find(name, revision)
        if found is None:
            return self.answer(404, X_Error_Code="RevisionNotFound")
        commit, files = found
        if file is None:
            return self.answer(200, {"id": name, "sha": commit, "tags": []})
        if name in hub.gated and not allowed:
            return self.answer(403, X_Error_Code="GatedRepo")
        if file not in files:
            return self.answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
        if self.command == "GET":
            hub.downloads.append(f"{commit}/{file}")
        etag = hashlib.sha256(files[file]).hexdigest()
        self.answer(200, files[file], ETag=f'"{etag}"', X_Repo_Commit=commit)

    do_HEAD = do_GET  # noqa: N815


def use_address(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", address)
    template = f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


@pytest.fixture
def fake_hub(monkeypatch, tmp_path, caches) -> Iterator[FakeHub]:  # noqa: F811
    """A Hub, and a user who is logged in."""
    hub = FakeHub()
    thread = Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    use_address(monkeypatch, hub.address)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
    yield hub
    hub.shutdown()
    hub.server_close()
    thread.join(timeout=10)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one epoch with an average of the weights."""
    folder = tmp_path_factory.mktemp("run")
    settings = [*SMALL_DATA, *SMALL_TRAINER, *SMALL_UNET, "ema=0.9", "model.weights=null"]
    settings[settings.index("trainer.max_epochs=2")] = "trainer.max_epochs=1"
    assert run_command(f"train output_dir=run {' '.join(settings)}", folder) == 0
    return folder / "run"


def saved(path: Path, model: dict | None = None, data: dict | None = None) -> Path:
    """A checkpoint of `Tiny`."""
    torch.manual_seed(0)
    network = Network(Tiny(2), (0.1, 0.2, 0.3), (1, 2, 3))
    model = {"_target_": f"{__name__}.Tiny"} if model is None else model
    content = {
        "state_dict": {f"network.{key}": value for key, value in network.state_dict().items()},
        checkpoint.KEY: checkpoint.describe(network, LABELS, model, data or {}, (40, 48)),
    }
    torch.save(content, path)
    return path


def load(path: str | Path) -> Segmenter:
    return Segmenter.load(path, "cpu", trust=[__name__], precision="32-true")


def logits(segmenter: Segmenter) -> torch.Tensor:
    images = torch.randint(256, (1, 3, 40, 48), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return segmenter.network(images.to(torch.uint8))["out"]


def card(text: str) -> tuple[dict, str]:
    """The settings at the head of a model card, and what follows them."""
    _, head, body = text.split("---\n", 2)
    return yaml.safe_load(head), body


# Uploading and downloading


def test_a_run_is_pushed_and_comes_back_with_equal_logits(run_folder, fake_hub, tmp_path):
    segmenter = load(run_folder)
    address = segmenter.push_to_hub("owner/tiny", private=True, license="mit")
    assert address == f"{fake_hub.address}/owner/tiny"
    assert fake_hub.private == {"owner/tiny"}
    loaded = load("hf://owner/tiny")
    assert torch.equal(logits(loaded), logits(segmenter))
    assert loaded.labels == segmenter.labels
    assert np.array_equal(loaded.labels.palette, segmenter.labels.palette)
    assert loaded.inference.resize == segmenter.inference.resize
    # Those that were validated, not those that an optimiser goes on with.
    content = torch.load(run_folder / "checkpoints/best.ckpt", weights_only=True)
    state = load_file(checkpoint.locate("hf://owner/tiny"))
    averaged = {k.removeprefix("network."): v for k, v in content["state_dict"].items()}
    assert all(torch.equal(state[key], averaged[key]) for key in state)


def test_every_command_takes_a_model_of_the_hub(run_folder, fake_hub, tmp_path, capsys):
    load(run_folder).push_to_hub("owner/tiny")
    commit = fake_hub.commits["owner/tiny"][-1][0]
    fake_hub.commit("owner/tiny", {"config.json": b"{}"})  # broken since
    Image.fromarray(np.zeros((40, 48, 3), np.uint8)).save(tmp_path / "photo.png")
    model = f"hf://owner/tiny@{commit}"
    line = f"predict input=photo.png output=out {ON_CPU} checkpoint="
    assert run_command(line + model, tmp_path) == 0
    mask = np.array(Image.open(tmp_path / "out/mask/photo.png"))
    assert np.array_equal(mask, load(run_folder).predict(tmp_path / "photo.png").mask)
    assert run_command(line + "hf://owner/tiny@main", tmp_path) == 2
    evaluate = f"evaluate checkpoint={model} output_dir=scores trainer.accelerator=cpu"
    assert run_command(evaluate, tmp_path) == 0
    scores, expected = (
        json.loads((folder / "test_metrics.json").read_text())
        for folder in (tmp_path / "scores", run_folder)
    )
    assert scores == expected
    train = f"train output_dir=run trainer.accelerator=cpu {' '.join(SMALL_DATA)} init_from="
    assert run_command(f"{train}hf://owner/nowhere", tmp_path) == 2
    assert "no such repository" in capsys.readouterr().err
    assert run_command(f"export checkpoint={model}", tmp_path) == 2  # not into the cache


def test_the_newest_commit_is_used_and_without_a_network_the_cached_one(
    fake_hub, monkeypatch, tmp_path
):
    segmenter = load(saved(tmp_path / "a.ckpt"))
    segmenter.push_to_hub("owner/tiny")
    assert torch.equal(logits(load("hf://owner/tiny")), logits(segmenter))
    first = fake_hub.commits["owner/tiny"][-1][0]
    nn.init.ones_(segmenter.network.model.layer.bias)
    segmenter.push_to_hub("owner/tiny", commit_message="Better")
    newest = load("hf://owner/tiny").network.model.layer.bias
    assert (newest == 1).all()
    assert not (load(f"hf://owner/tiny@{first}").network.model.layer.bias == 1).any()
    downloads = list(fake_hub.downloads)
    load("hf://owner/tiny")
    assert fake_hub.downloads == downloads  # from the cache
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        use_address(monkeypatch, f"http://127.0.0.1:{unused.getsockname()[1]}")
        assert torch.equal(load("hf://owner/tiny").network.model.layer.bias, newest)


def test_a_folder_of_the_same_name_is_not_taken_for_a_repository(fake_hub, monkeypatch, tmp_path):
    load(saved(tmp_path / "a.ckpt")).save_pretrained(tmp_path / "owner/tiny")
    monkeypatch.chdir(tmp_path)
    load("owner/tiny")
    with pytest.raises(InputError, match="no such repository"):
        load("hf://owner/tiny")


# What is written


def test_the_card_has_what_the_hub_shows(run_folder, tmp_path):
    segmenter = load(run_folder)
    segmenter.save_pretrained(tmp_path / "tiny", license="mit")
    head, body = card((tmp_path / "tiny/README.md").read_text())
    assert head["pipeline_tag"] == "image-segmentation"
    assert (head["library_name"], head["license"]) == ("seg_torch", "mit")
    scores = json.loads((run_folder / "test_metrics.json").read_text())
    (result,) = head["model-index"][0]["results"]
    published = {metric["type"]: metric["value"] for metric in result["metrics"]}
    assert published == {key: scores[key] for key in published}
    assert {"mean_iou", "pixel_accuracy"} <= published.keys()
    assert f"| Mean IoU | {scores['mean_iou']:.4f} |" in body
    for i, name in enumerate(segmenter.labels.names):
        colour = f"#{bytes(segmenter.labels.palette[i]).hex()}"
        iou = scores["per_class"][name]["iou"]
        cell = "absent" if iou is None else f"{iou:.4f}"
        assert f"| {i} | `{name}` | `{colour}` | {cell} |" in body
    assert json.loads((tmp_path / "tiny/test_metrics.json").read_text()) == scores
    assert 'Segmenter.load("tiny")' in body
    assert f"pip install 'segwright @ git+{REPOSITORY}'" in body, "e47"
    # Pushed on from there, it keeps its scores; the last checkpoint has none.
    load(tmp_path / "tiny").save_pretrained(tmp_path / "again")
    assert "| Mean IoU |" in (tmp_path / "again/README.md").read_text()
    load(run_folder / "checkpoints/last.ckpt").save_pretrained(tmp_path / "last")
    head, _ = card((tmp_path / "last/README.md").read_text())
    assert head.keys().isdisjoint({"model-index", "license"})
    assert not (tmp_path / "last/test_metrics.json").exists()
    # A copy of the best one elsewhere does not take scores that happen to lie above it.
    copies = tmp_path / "copies"
    copies.mkdir()
    shutil.copy(run_folder / "checkpoints/best.ckpt", copies)
    (tmp_path / "test_metrics.json").write_text(json.dumps(scores))
    assert load(copies / "best.ckpt").scores is None
    assert load(run_folder / "checkpoints/best.ckpt").scores == run_folder / "test_metrics.json"


def test_an_image_is_published_only_where_it_is_given(tmp_path):
    segmenter = load(saved(tmp_path / "a.ckpt"))
    segmenter.save_pretrained(tmp_path / "without")
    names = {path.name for path in (tmp_path / "without").iterdir()}
    assert names == {"README.md", "classes.png", "config.json", "model.safetensors"}
    assert "example.jpg" not in (tmp_path / "without/README.md").read_text()
    segmenter.save_pretrained(tmp_path / "with", image=np.full((40, 48, 3), 99, np.uint8))
    assert "(example.jpg)" in (tmp_path / "with/README.md").read_text()
    with Image.open(tmp_path / "with/example.jpg") as example:
        assert example.width > example.height


def test_names_of_classes_mean_nothing_to_markdown(tmp_path):
    load(saved(tmp_path / "a.ckpt")).save_pretrained(tmp_path / "out")
    assert r"| 1 | `left \| right 'lane'` | `#c864ff` |" in (tmp_path / "out/README.md").read_text()


def test_nothing_of_the_users_machine_is_published(tmp_path):
    data = {
        "_target_": "seg_torch.data.SegmentationDataModule",
        "root": "alice",
        "batch_size": 4,
        "classes": {"crop": ["Crop", "maize"], "soil": "Soil"},
        "rest": "ignore",
        "augment": {"_target_": "seg_torch.data.transforms.augment", "crop": [8, 8]},
        "dataset": {
            "_target_": "seg_torch.datasets.folder",
            "_partial_": True,
            "val_fraction": 0.3,
            "extra": ["/home/alice/more"],
            "id2label": "alice.json",
        },
    }
    segmenter = load(saved(tmp_path / "alice.ckpt", data=data))
    segmenter.save_pretrained(tmp_path / "out")
    for path in (tmp_path / "out").iterdir():
        assert b"alice" not in path.read_bytes(), path
        assert str(tmp_path).encode() not in path.read_bytes(), path
    published = json.loads((tmp_path / "out/config.json").read_text())["seg_torch"]
    assert published["data"]["dataset"]["val_fraction"] == 0.3  # the split that it was trained on
    groups = {key: published["data"][key] for key in ("classes", "rest")}
    assert groups == {key: data[key] for key in groups}
    assert published["versions"]["torch"] == torch.__version__.partition("+")[0]
    line = f"evaluate checkpoint=out trust=[{__name__}] trainer.accelerator=cpu output_dir=scores"
    assert run_command(line, tmp_path) == 2


def test_evaluate_asks_for_the_data_of_a_published_model(tmp_path, capsys):
    data = {
        "_target_": "seg_torch.data.SegmentationDataModule",
        "root": "alice",
        "dataset": {"_target_": "seg_torch.datasets.folder", "_partial_": True},
    }
    load(saved(tmp_path / "a.ckpt", data=data)).save_pretrained(tmp_path / "out")
    line = f"evaluate checkpoint=out trust=[{__name__}] trainer.accelerator=cpu output_dir=scores"
    assert run_command(line, tmp_path) == 2
    assert "give data.root=" in capsys.readouterr().err
    assert run_command(f"{line} data.root=mine", tmp_path) == 2
    assert "mine" in capsys.readouterr().err


def test_published_weights_of_torchvision_are_pushed_with_vocs_classes(tmp_path):
    published_mobilenet(tmp_path)
    segmenter = Segmenter.pretrained("deeplabv3", "mobilenet_v3_large", "cpu", precision="32-true")
    segmenter.save_pretrained(tmp_path / "out")
    loaded = load(tmp_path / "out")
    assert torch.equal(logits(loaded), logits(segmenter))
    assert loaded.labels.names[1] == "aeroplane"


# What is refused


def test_what_cannot_be_saved_is_refused_and_nothing_is_written(tmp_path):
    path = saved(tmp_path / "a.ckpt")
    segmenter = load(path)
    own = Segmenter(Network(Tiny(2)), LABELS, device="cpu")
    rounded = Segmenter.load(path, "cpu", [__name__], precision="bf16-true")
    model = {"_target_": f"{__name__}.Tiny", "file": "/home/alice/x.pth"}
    needs_file = load(saved(tmp_path / "b.ckpt", model))
    for wrong, part in (
        (own, "Segmenter.load"),
        (rounded, "rounded to bf16-true"),
        (needs_file, "holds '/home/alice/x.pth'"),
    ):
        with pytest.raises(InputError, match=re.escape(part)):
            wrong.save_pretrained(tmp_path / "out")
    (tmp_path / "test_metrics.json").write_text("[1")
    (tmp_path / "checkpoints").mkdir()
    scored = load(shutil.copy(path, tmp_path / "checkpoints/best.ckpt"))
    with pytest.raises(InputError, match=r"test_metrics\.json: not the scores"):
        scored.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/README.md").write_text("mine")
    with pytest.raises(InputError, match="not empty"):
        segmenter.save_pretrained(tmp_path / "mine")
    assert [p.read_text() for p in (tmp_path / "mine").iterdir()] == ["mine"]


def test_what_stops_a_push_is_one_message_for_each_reason(fake_hub, monkeypatch, tmp_path):
    segmenter = load(saved(tmp_path / "a.ckpt"))

    def refused(name: str, part: str) -> None:
        with pytest.raises(InputError, match=re.escape(part)) as found:
            segmenter.push_to_hub(name)
        assert str(found.value).startswith(f"push_to_hub('{name}'): ")
        assert "\n" not in str(found.value)

    refused("tiny", "expected OWNER/NAME")
    refused("owner/a b", "refused it")
    refused("someone/tiny", "is someone your account")
    monkeypatch.delenv("HF_TOKEN")
    refused("owner/tiny", "not logged in: run hf auth login")
    use_address(monkeypatch, "http://127.0.0.1:9")
    refused("owner/tiny", "cannot be reached")


def test_what_cannot_be_had_is_one_message_for_each_reason(fake_hub, monkeypatch, tmp_path):
    segmenter = load(saved(tmp_path / "a.ckpt"))
    segmenter.push_to_hub("owner/tiny")
    segmenter.push_to_hub("owner/private", private=True)
    segmenter.push_to_hub("owner/gated")
    fake_hub.gated.add("owner/gated")
    fake_hub.commit("owner/empty", {"README.md": b""})
    fake_hub.commit("owner/half", {"config.json": b'{"seg_torch": {}}'})
    fake_hub.commit("owner/other", {"config.json": b'{"id2label": {}}'})
    monkeypatch.delenv("HF_TOKEN")

    def refused(path: str, part: str) -> None:
        with pytest.raises(InputError, match=re.escape(part)) as found:
            load(path)
        assert str(found.value).startswith(f"checkpoint={path}: ")
        assert "\n" not in str(found.value)

    refused("hf://tiny", "expected hf://OWNER/NAME")
    refused("hf://owner/a b", "OWNER/NAME")
    refused("hf://owner/nowhere", "no such repository, or it is private (hf auth login)")
    refused("hf://owner/private", "no such repository, or it is private (hf auth login)")
    refused("hf://owner/gated", "asks for consent: give it at https://huggingface.co/owner/gated")
    refused("hf://owner/tiny@v9", "no branch, tag or commit v9")
    refused("hf://owner/empty", "there is no config.json in it")
    refused("hf://owner/half", "there is no model.safetensors in it")
    refused("hf://owner/other", "model=hub model.name=owner/other")
    use_address(monkeypatch, "http://127.0.0.1:9")
    refused("hf://owner/never", "run hf download owner/never --local-dir FOLDER, and give checkpoi")


def test_broken_and_evil_files_are_one_message(tmp_path):
    home = tmp_path / "model"
    load(saved(tmp_path / "a.ckpt")).save_pretrained(home)
    config, weights = home / "config.json", home / "model.safetensors"
    good, state, content = config.read_text(), load_file(weights), weights.read_bytes()
    about = json.loads(good)["seg_torch"]
    run = tmp_path / "run"
    evil = {**about, "model": {"_target_": "os.system", "command": f"touch '{run}'"}}
    nested = {**about, "model": {**about["model"], "part": {"_target_": "os.getcwd"}}}
    reads = {**about, "model": {**about["model"], "key": "${oc.env:HOME}"}}
    for text, part in (
        ("[1, 2", "cannot be read as a checkpoint: Expecting"),
        ("[1, 2]", "cannot be read as a checkpoint"),
        ("{}", "not a checkpoint of seg_torch"),
        ('{"seg_torch": {"labels": 1}}', "cannot be read as a checkpoint"),
        ("[" * 100_000, "cannot be read as a checkpoint"),
        (json.dumps({"seg_torch": {**about, "preprocessing": {}}}), "it has no 'mean'"),
        (json.dumps({"seg_torch": evil}), "wants to run os.system"),
        (json.dumps({"seg_torch": nested}), "wants to run os.getcwd"),
        (json.dumps({"seg_torch": reads}), "holds an interpolation"),
    ):
        config.write_text(text)
        with pytest.raises(InputError, match=re.escape(part)):
            load(home)
    assert not run.exists()
    config.write_text(good)
    with pytest.raises(InputError, match=rf"wants to run {__name__}"):
        Segmenter.load(home)  # without trust
    for broken in (b"", b"<!DOCTYPE html>", content[: len(content) // 2]):
        weights.write_bytes(broken)
        with pytest.raises(InputError, match="cannot be read as a state dict"):
            load(home)
    save_file({key: value for key, value in state.items() if "bias" not in key}, weights)
    with pytest.raises(InputError, match="weights do not fit its own model"):
        load(home)


def test_e49_the_card_says_of_which_images_the_scores_are(run_folder, tmp_path):
    copy = shutil.copytree(run_folder, tmp_path / "run")
    scores = json.loads((copy / "test_metrics.json").read_text())
    for changes, title, split in (
        ({}, "## Scores on the test images of `shapes`", "test"),
        (
            {"split": "val"},
            "## Scores on the validation images, which chose the best epoch, of `shapes`",
            "val",
        ),
        ({"images": 1}, "## Scores on the 1 of the 3 test images of `shapes`", "test"),
    ):
        (copy / "test_metrics.json").write_text(json.dumps(scores | changes))
        folder = tmp_path / f"tiny {len(list(tmp_path.iterdir()))}"
        load(copy).save_pretrained(folder)
        head, body = card((folder / "README.md").read_text())
        assert title in body.splitlines()
        (result,) = head["model-index"][0]["results"]
        assert result["dataset"]["split"] == split
