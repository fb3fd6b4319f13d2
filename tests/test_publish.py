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
from PIL import Image
from safetensors.torch import load_file, save_file
from test_models import caches, published_mobilenet  # noqa: F401
from torch import nn

from seg_torch import Segmenter, checkpoint
from seg_torch.errors import InputError
from seg_torch.labels import Labels
from seg_torch.models.network import Network

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
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_POST(self) -> None:  # noqa: N802
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

    def do_GET(self) -> None:  # noqa: N802
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
    """A run of two epochs with an average of the weights, on data in a folder of the user's."""
    folder = tmp_path_factory.mktemp("home-of-alice")
    settings = [*SMALL_DATA, *SMALL_TRAINER, *SMALL_UNET, "ema=0.9", "model.weights=null"]
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
    assert loaded.resize == segmenter.resize
    # Those that were validated, not those that an optimiser goes on with.
    content = torch.load(run_folder / "checkpoints/best.ckpt", weights_only=True)
    state = load_file(checkpoint.locate("hf://owner/tiny"))
    averaged = {k.removeprefix("network."): v for k, v in content["state_dict"].items()}
    assert all(torch.equal(state[key], averaged[key]) for key in state)


def test_every_command_takes_a_model_of_the_hub(run_folder, fake_hub, tmp_path):
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
    line = f"train init_from={model} output_dir=run model.weights=null trainer.limit_val_batches=0 "
    settings = [*SMALL_DATA, *SMALL_TRAINER, *SMALL_UNET, "+trainer.limit_train_batches=1"]
    settings = [s.replace("max_epochs=2", "max_epochs=1") for s in settings]
    settings += ["optimizer.lr=1e-12"]
    assert run_command(line + " ".join(settings), tmp_path) in (0, 2)
