"""Weights from files and from where they are published."""

import logging
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import safetensors.torch
import torch
import torchvision
from models_for_tests import MODELS, NUM_CLASSES, caches, images, torch_cache  # noqa: F401
from torch import nn

from seg_torch.errors import InputError
from seg_torch.models import deeplabv3, fcn
from seg_torch.models.weights import load_matching_weights, read_state_dict


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_weights_from_a_file(suffix, tmp_path):
    expected = MODELS["deeplabv3_mobilenet"]().eval()
    file = tmp_path / f"weights{suffix}"
    if suffix == ".pth":
        torch.save(expected.state_dict(), file)
    else:
        safetensors.torch.save_file(expected.state_dict(), file)
    model = deeplabv3(NUM_CLASSES, "mobilenet_v3_large", weights=file).eval()
    x = images(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(model(x)["out"], expected(x)["out"])


def test_a_file_of_another_model_is_refused(tmp_path):
    file = tmp_path / "resnet18.pth"
    torch.save(torchvision.models.resnet18().state_dict(), file)
    with pytest.raises(InputError, match=r"resnet18\.pth does not fit.*backbone\.0\.0\.weight"):
        deeplabv3(NUM_CLASSES, "mobilenet_v3_large", weights=file)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_d26_files_that_hold_no_tensors_are_one_message(suffix, tmp_path):
    layer = nn.Linear(200, 200).state_dict()
    good = tmp_path / f"good{suffix}"
    safetensors.torch.save_file(layer, good) if suffix != ".pth" else torch.save(layer, good)
    torch.save(layer, tmp_path / "old", _use_new_zipfile_serialization=False)
    contents = [
        *(b"", b"\n", b"0", b"hello world\n", b"weights of a model\n" * 50, b"\xff\xfeh\0e\0"),
        *(b"<!DOCTYPE html><html>", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
        *(bytes([first]) + b" a b c\n" * 9 for first in range(256)),
        *(good.read_bytes()[:size] for size in (1, 7, 100, 5000, -1000)),
        *((tmp_path / "old").read_bytes()[:size] for size in (1, 7, 100, 5000, -1000)),
    ]
    file = tmp_path / f"broken{suffix}"
    for content in contents:
        file.write_bytes(content)
        with pytest.raises(InputError, match=rf"broken{suffix} (cannot be read|holds)") as error:
            read_state_dict(file)
        assert "\n" not in str(error.value)
    file.write_bytes(b"")
    with pytest.raises(InputError, match="the file is empty"):
        read_state_dict(file)


def test_files_that_are_no_state_dict_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"absent\.pth does not exist"):
        read_state_dict(tmp_path / "absent.pth")
    torch.save({"epoch": 3, "model": {}}, tmp_path / "training.pth")
    with pytest.raises(InputError, match=r"training\.pth holds the keys \['epoch', 'model'\]"):
        read_state_dict(tmp_path / "training.pth")
    torch.save(nn.Linear(2, 2), tmp_path / "pickled.pth")
    with pytest.raises(InputError, match=r"pickled\.pth cannot be read"):
        read_state_dict(tmp_path / "pickled.pth")


def test_weights_that_cannot_be_downloaded_name_file_folder_and_way_out(tmp_path):
    with pytest.raises(InputError) as error:
        fcn(21, "resnet50")
    message = str(error.value)
    assert "fcn_resnet50_coco-1167a1af.pth" in message
    assert str(tmp_path / "torch" / "hub" / "checkpoints") in message
    assert "model.weights=null" in message


def test_published_weights_are_downloaded_by_one_of_the_processes_that_need_them(
    tmp_path, monkeypatch
):
    torch_cache(tmp_path)
    state_dict = torchvision.models.mobilenet_v3_large().state_dict()
    downloads = []

    def download(url, path, *_, **__):
        downloads.append(url)
        time.sleep(0.5)
        torch.save(state_dict, path)

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    with ThreadPoolExecutor(3) as pool:
        built = [pool.submit(deeplabv3, 2, "mobilenet_v3_large", "imagenet") for _ in range(3)]
        assert all(each.result() for each in built)
    assert len(downloads) == 1


def test_imagenet_weights_that_cannot_be_downloaded_are_one_message():
    with pytest.raises(InputError, match=r"resnet50.*model\.weights=null"):
        deeplabv3(NUM_CLASSES, "resnet50", "imagenet")


@pytest.mark.promise(26)
def test_matching_weights_are_loaded_and_the_others_listed_in_one_line(caplog):
    source = deeplabv3(7, "mobilenet_v3_large", None)
    model = deeplabv3(NUM_CLASSES, "mobilenet_v3_large", None, aux=False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with caplog.at_level(logging.INFO):
        load_matching_weights(model, source.state_dict(), "run/best.ckpt")
    (line,) = caplog.messages
    classifier = ["classifier.4.weight", "classifier.4.bias"]
    loaded = len(before) - 2
    assert f"loaded {loaded} of {len(before)} tensors from run/best.ckpt" in line
    assert line.endswith(f"newly initialised: {', '.join(classifier)}")
    assert "aux_classifier.4.weight" in line.split("skipped: ")[1]
    for name, tensor in model.state_dict().items():
        origin = before if name in classifier else source.state_dict()
        assert torch.equal(tensor, origin[name]), name
    with pytest.raises(InputError, match=r"2 of its \d+ tensors .* classifier\.4\.weight"):
        load_matching_weights(model, source.state_dict(), "run/best.ckpt", ("aux_classifier.",))
