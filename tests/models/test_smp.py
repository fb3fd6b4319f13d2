"""Models of segmentation_models_pytorch, beside the library's own."""

import json
import logging

import pytest
import safetensors.torch
import timm
import torch
from models_for_tests import NUM_CLASSES, caches, hugging_face_cache, images  # noqa: F401

from seg_torch.errors import InputError
from seg_torch.models import smp

# segmentation_models_pytorch


SMP_ARCHITECTURES = (
    *("Unet", "UnetPlusPlus", "MAnet", "Linknet", "FPN", "PSPNet", "DeepLabV3", "DeepLabV3Plus"),
    *("PAN", "UPerNet", "Segformer", "DPT"),
)


@pytest.mark.promise(12)
@pytest.mark.parametrize("architecture", SMP_ARCHITECTURES)
def test_every_architecture_of_smp_takes_every_size(architecture):
    pytest.importorskip("segmentation_models_pytorch")
    encoder = "tu-vit_tiny_patch16_224" if architecture == "DPT" else "resnet18"
    model = smp(NUM_CLASSES, architecture, encoder, weights=None).eval()
    for size in ((65, 71), (32, 32)):
        with torch.no_grad():
            logits = model(images(1, 3, *size))["out"]
        assert logits.shape == (1, NUM_CLASSES, *size)
        assert logits.isfinite().all()


def test_smp_gives_the_librarys_logits_with_the_published_encoder(tmp_path):
    library = pytest.importorskip("segmentation_models_pytorch")
    torch.manual_seed(0)
    expected = library.Unet("resnet18", encoder_weights=None, classes=NUM_CLASSES).eval()
    source = library.encoders.encoders["resnet18"]["pretrained_settings"]["imagenet"]
    folder = hugging_face_cache(tmp_path, source["repo_id"], source["revision"])
    safetensors.torch.save_file(expected.encoder.state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"mean": [0.1, 0.2, 0.3], "std": [1, 2, 3]}))
    model = smp(NUM_CLASSES, "Unet", "resnet18").eval()
    assert (model.mean, model.std) == ([0.1, 0.2, 0.3], [1, 2, 3])
    model.model.decoder.load_state_dict(expected.decoder.state_dict())
    model.model.segmentation_head.load_state_dict(expected.segmentation_head.state_dict())
    x = images(1, 3, 64, 96)
    with torch.no_grad():
        torch.testing.assert_close(model(x)["out"], expected(x))


def test_smp_takes_timms_weights_for_timms_encoders(tmp_path, caplog):
    caplog.set_level(logging.ERROR, "timm")  # as on the command line
    caplog.set_level(logging.INFO)
    pytest.importorskip("segmentation_models_pytorch")
    published = timm.create_model("tf_efficientnet_lite0.in1k")
    repository = timm.get_pretrained_cfg("tf_efficientnet_lite0.in1k").hf_hub_id
    file = hugging_face_cache(tmp_path, repository) / "model.safetensors"
    safetensors.torch.save_file(published.state_dict(), file)
    model = smp(NUM_CLASSES, "FPN", "tu-tf_efficientnet_lite0.in1k")
    own = model.model.encoder.model.state_dict()
    assert all(torch.equal(v, published.state_dict()[k]) for k, v in own.items())
    assert model.mean == (0.5, 0.5, 0.5)
    (line,) = caplog.messages
    assert line == f"loaded the weights of the encoder tf_efficientnet_lite0.in1k from {file}"


def test_smp_takes_the_weights_of_a_file_and_refuses_those_of_another_encoder(tmp_path, caplog):
    caplog.set_level(logging.ERROR, "timm")  # as on the command line
    caplog.set_level(logging.INFO)
    library = pytest.importorskip("segmentation_models_pytorch")
    for name in ("resnet18", "resnet34"):
        encoder = library.encoders.get_encoder(name, weights=None)
        torch.save(encoder.state_dict(), tmp_path / f"{name}.pth")
    model = smp(NUM_CLASSES, "FPN", "resnet34", weights=tmp_path / "resnet34.pth")
    (line,) = caplog.messages
    assert line == f"loaded the weights of the encoder resnet34 from {tmp_path / 'resnet34.pth'}"
    own = model.model.encoder.state_dict()
    assert all(torch.equal(own[k], v) for k, v in encoder.state_dict().items())
    with pytest.raises(InputError, match=r"resnet18\.pth does not fit the encoder resnet34"):
        smp(NUM_CLASSES, "FPN", "resnet34", weights=tmp_path / "resnet18.pth")


def test_smp_refuses_unknown_names_with_the_alternatives():
    pytest.importorskip("segmentation_models_pytorch")
    with pytest.raises(InputError, match=r"'unet3'; use one of Unet, .*DPT"):
        smp(NUM_CLASSES, "unet3")
    with pytest.raises(InputError, match=r"'resnet43'.*resnet34.*tu-NAME"):
        smp(NUM_CLASSES, "Unet", "resnet43")
    with pytest.raises(InputError, match=r"'coco'.*use imagenet"):
        smp(NUM_CLASSES, "Unet", "resnet18", weights="coco")
    with pytest.raises(InputError, match="cannot make DPT with resnet18"):
        smp(NUM_CLASSES, "DPT", "resnet18", weights=None)


@pytest.mark.promise(8)
def test_smp_architectures_that_pool_refuse_to_train_on_a_batch_of_one():
    pytest.importorskip("segmentation_models_pytorch")
    model = smp(NUM_CLASSES, "DeepLabV3Plus", "resnet18", weights=None).train()
    with pytest.raises(InputError, match=r"data\.batch_size=2"):
        model(images(1, 3, 64, 64))
