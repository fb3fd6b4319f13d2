"""Published models of the Hugging Face Hub: tiny ones, written in its format to the local cache."""

import copy
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import make_data
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import run_command
from huggingface_hub.errors import GatedRepoError, RemoteEntryNotFoundError, RepositoryNotFoundError
from models_for_tests import MASK_MODELS, SEGFORMER, caches, hugging_face_cache  # noqa: F401
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from seg_torch import Segmenter
from seg_torch.checkpoints.hub import hub, match_class_names, with_classes
from seg_torch.commands.evaluate import evaluate
from seg_torch.datasets.published.ade20k import ADE20K_LABELS, ade20k
from seg_torch.errors import InputError
from seg_torch.labels import Labels
from seg_torch.models.network import IMAGENET_MEAN, IMAGENET_STD, Network

NAMES = ["wall", "flying saucer ", "sky", "sky"]
ON_CPU = "trainer.accelerator=cpu trainer.precision=32-true"


@pytest.fixture(autouse=True)
def no_confusion_matrix(monkeypatch) -> None:
    """Drawing one takes five seconds for 150 classes."""
    figure = SimpleNamespace(savefig=lambda path: Path(path).touch())
    monkeypatch.setattr("seg_torch.evaluation.results.confusion_matrix", lambda *_: figure)


def publish(
    folder: Path, config: dict = SEGFORMER, names: list[str] = NAMES, settings: dict | None = None
) -> nn.Module:
    """Write a tiny model as the library does, and return it."""
    library = pytest.importorskip("transformers")
    torch.manual_seed(0)
    full = library.AutoConfig.for_model(**copy.deepcopy(config))  # 5.0 takes keys out
    full.id2label = dict(enumerate(names))
    mask = config["model_type"] in MASK_MODELS
    kind = "AutoModelForUniversalSegmentation" if mask else "AutoModelForSemanticSegmentation"
    model = getattr(library, kind).from_config(full).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # one pixel is not like the next
            parameter.add_(torch.randn_like(parameter), alpha=0.1 if mask else 0.05)
        for module in model.modules():  # as after training: what comes through has some size
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 1
        if not mask:
            model.train()(pixel_values=torch.rand(4, 3, 64, 64))
        model.eval()
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(settings or {}))
    return model


def photo(path: Path, height: int = 64, width: int = 96) -> np.ndarray:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return pixels


def normalised(pixels: np.ndarray, mean=IMAGENET_MEAN, std=IMAGENET_STD) -> Tensor:
    x = (pixels / 255 - np.array(mean)) / np.array(std)
    return torch.from_numpy(x).float().permute(2, 0, 1)[None]


def enlarged(logits: Tensor, pixels: np.ndarray) -> np.ndarray:
    size = pixels.shape[:2]
    return F.interpolate(logits, size=size, mode="bilinear", align_corners=False)[0].numpy()


def test_predict_uses_a_model_of_the_hub_with_its_own_classes(tmp_path):
    model = publish(hugging_face_cache(tmp_path, "owner/tiny"))
    pixels = photo(tmp_path / "photo.png")
    line = f"predict input=photo.png output=out model=hub model.name=owner/tiny {ON_CPU}"
    assert run_command(line, tmp_path) == 0
    mask = Image.open(tmp_path / "out" / "mask" / "photo.png")
    assert json.loads(mask.text["names"]) == ["wall", "flying saucer", "sky", "sky 3"]
    with torch.no_grad():
        expected = enlarged(model(normalised(pixels)).logits, pixels).argmax(0)
    assert len(np.unique(expected)) > 1
    assert (np.array(mask) == expected).mean() > 0.999


@pytest.mark.parametrize("kind", MASK_MODELS)
def test_masks_and_classes_of_the_hub_become_logits_as_in_the_paper(kind, tmp_path):
    """Cheng et al. (2021), section 3.4; the task is in the tokens that CLIP's tokenizer gives."""
    model = publish(hugging_face_cache(tmp_path, "owner/tiny"), MASK_MODELS[kind])
    side = 32 if kind == "eomt" else 64
    pixels = np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8)
    task = torch.tensor([[49406, 518, 10549, 533, 29119, 1550, 49407, *[0] * 70]])
    inputs = {"task_inputs": task} if kind == "oneformer" else {}
    with torch.no_grad():
        outputs = model(pixel_values=normalised(pixels), **inputs)
        network = hub("owner/tiny").network.eval()
        logits = network(torch.from_numpy(pixels).permute(2, 0, 1)[None])["out"]
    classes = outputs.class_queries_logits.double().softmax(-1)[0, :, :-1]
    masks = outputs.masks_queries_logits.double().sigmoid()[0]
    scores = sum(c[:, None, None] * m for c, m in zip(classes, masks, strict=True))
    assert scores.log().std((1, 2)).min() > 0.1
    torch.testing.assert_close(logits[0], scores.log().float(), rtol=1e-3, atol=1e-3)


# What an image processor of the library makes of an image, but for its size.
@pytest.mark.parametrize(
    ("config", "settings"),
    [
        (SEGFORMER, {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}),
        (SEGFORMER, {"rescale_factor": 1 / 127.5, "image_mean": [1, 1, 1], "image_std": [1, 2, 3]}),
        (SEGFORMER, {"do_rescale": False, "image_mean": [99, 98, 97], "image_std": [50, 51, 52]}),
        (SEGFORMER, {"do_normalize": False}),
        (
            {"model_type": "mobilevit", "hidden_sizes": [16, 16, 16], "neck_hidden_sizes": [8] * 7},
            {"do_flip_channel_order": True, "do_center_crop": False},
        ),
    ],
)
def test_images_are_scaled_as_the_preprocessor_says(config, settings, tmp_path):
    library = pytest.importorskip("transformers")
    kind = "MobileViT" if "do_flip_channel_order" in settings else "Segformer"
    model = publish(tmp_path, config, NAMES, settings)
    processor = getattr(library, f"{kind}ImageProcessor")(**settings, do_resize=False)
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    network = hub(str(tmp_path)).network.eval()
    with torch.no_grad():
        expected = model(**processor(pixels, return_tensors="pt")).logits
        x = torch.from_numpy(pixels).permute(2, 0, 1)[None]
        logits, other = network(x)["out"], network(x.flip(1))["out"]
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-4)
    assert (other - expected).abs().max() > 0.01  # the order of the channels is seen


def test_smps_published_models_predict(tmp_path):
    library = pytest.importorskip("segmentation_models_pytorch")
    torch.manual_seed(0)
    model = library.Unet("resnet18", encoder_weights=None, classes=19, decoder_channels=[8] * 5)
    folder = hugging_face_cache(tmp_path, "smp-hub/unet-cityscapes")
    model.eval().save_pretrained(folder)
    transforms = [
        {"__class_fullname__": "Resize", "height": 512},
        {"__class_fullname__": "Normalize", "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]},
    ]
    text = json.dumps({"transform": {"transforms": transforms}})
    (folder / "albumentations_config_eval.json").write_text(text)
    pixels = photo(tmp_path / "photo.png")
    line = (
        f"predict input=photo.png output=out model=hub model.name=smp-hub/unet-cityscapes {ON_CPU}"
    )
    assert run_command(line, tmp_path) == 0
    mask = Image.open(tmp_path / "out" / "mask" / "photo.png")
    assert json.loads(mask.text["names"])[:3] == ["road", "sidewalk", "building"]
    with torch.no_grad():
        expected = model(normalised(pixels, [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]))[0].argmax(0)
    assert (np.array(mask) == expected.numpy()).mean() > 0.999


def test_evaluate_scores_models_of_the_hub_in_the_datasets_order_of_classes(tmp_path):
    make_data.make_ade20k(tmp_path / "data")
    names = list(ADE20K_LABELS.names)
    publish(tmp_path / "plain", names=names)
    # The same network with a background before its classes, which are backwards.
    shutil.copytree(tmp_path / "plain", tmp_path / "backwards")
    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    config["id2label"] = dict(enumerate(["background", *names[::-1]]))
    config["label2id"] = {name: i for i, name in config["id2label"].items()}
    (tmp_path / "backwards" / "config.json").write_text(json.dumps(config))
    state = load_file(tmp_path / "plain" / "model.safetensors")
    for key in ("decode_head.classifier.weight", "decode_head.classifier.bias"):
        state[key] = torch.cat([state[key][:1] + 100, state[key].flip(0)])
    save_file(state, tmp_path / "backwards" / "model.safetensors", {"format": "pt"})
    line = "evaluate model=hub model.name=backwards data=ade20k data.root=data output_dir=scores"
    assert run_command(f"{line} {ON_CPU} data.num_workers=0", tmp_path) == 0
    scores = json.loads((tmp_path / "scores" / "test_metrics.json").read_text())
    assert list(scores["per_class"]) == names
    segmenter = Segmenter.from_hub(str(tmp_path / "plain"), "cpu", precision="32-true")
    expected = np.zeros((150, 150), int)
    for image, mask in ade20k(tmp_path / "data", "val"):
        predicted = segmenter.predict(image).mask
        known = mask.numpy() != 255
        np.add.at(expected, (mask.numpy()[known], predicted[known]), 1)
    assert (expected.sum(0) > 0).sum() > 1
    assert np.array_equal(scores["confusion_matrix"], expected)


def test_evaluate_refuses_other_classes_and_what_is_no_published_model(tmp_path, compose):
    make_data.make_ade20k(tmp_path / "data")
    publish(tmp_path / "tiny", names=["wall", "sky", "road", "sand"])
    published = ["model=hub", f"model.name={tmp_path / 'tiny'}"]
    data = ["data=ade20k", f"data.root={tmp_path / 'data'}", "data.num_workers=0"]
    either = "needs checkpoint=FILE, or model=hub"
    lacking = "tiny knows the 4 classes (wall, sky, road, sand); of the 150 classes of the data it "
    for overrides, part in (
        ([*published, *data], f"{lacking}lacks 146: building, floor, tree, ceiling, bed"),
        (published, "give data=ade20k data.root=FOLDER"),
        (["model=unet", *data], either),
        ([*published, *data, "checkpoint=best.ckpt"], either),
    ):
        cfg = compose(
            "evaluate", f"output_dir={tmp_path / 'out'}", "trainer.accelerator=cpu", *overrides
        )
        with pytest.raises(InputError, match=re.escape(part)):
            evaluate(cfg)


def test_training_a_model_of_the_hub_names_the_way(tmp_path, capsys):
    line = f"train data=shapes model=hub model.name=owner/tiny output_dir=run {ON_CPU}"
    assert run_command(line, tmp_path) == 2
    assert "model.weights=owner/tiny" in capsys.readouterr().err


def test_the_colours_are_those_of_ade20k_where_the_classes_are(tmp_path):
    names = [*ADE20K_LABELS.names]
    names[6], names[8], names[34] = "road, route", "window ", "rock, stone"
    publish(tmp_path, names=names)
    labels = hub(str(tmp_path)).labels
    assert labels.names[6] == "road, route"
    assert np.array_equal(labels.palette, ADE20K_LABELS.palette)


def test_classes_are_found_by_name():
    wanted = ["wall", "windowpane", "sky", "tree"]
    assert match_class_names(["sky", "tree", "Wall, brick", "windowpane"], wanted) == [2, 3, 0, 1]
    assert match_class_names(["background", *wanted], wanted) == [1, 2, 3, 4]
    assert match_class_names(["wall", "window ", "sky", "tree"], wanted) == [0, 1, 2, 3]
    assert match_class_names(["other", "wall", "window ", "sky", "tree"], wanted) == [1, 2, 3, 4]
    assert match_class_names(["window", "wall", "sky", "tree"], wanted) is None  # at another place
    assert match_class_names(["LABEL_0", "LABEL_1", "LABEL_2", "LABEL_3"], wanted) is None
    assert match_class_names(["wall", "sky"], wanted) is None


def test_a_network_gets_the_classes_of_the_data_and_itself_stays():
    class Constant(nn.Module):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"out": torch.tensor([10.0, 20, 30]).view(1, 3, 1, 1)}

    network = Network(Constant(), mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    labels, images = Labels(("sky", "tree", "wall")), torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    chosen = with_classes(network, labels, Labels(("wall", "sky")), "a model")
    assert chosen(images)["out"].flatten().tolist() == [30, 10]
    assert torch.equal(chosen.mean, network.mean)
    assert torch.equal(chosen.std, network.std)
    assert network(images)["out"].flatten().tolist() == [10, 20, 30]
    assert with_classes(network, labels, labels, "a model") is network
    with pytest.raises(InputError, match=r"a model knows the 3 classes .* it lacks 1: river"):
        with_classes(network, labels, Labels(("sky", "river")), "a model")


def failing(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def get_hf_file_metadata(url: str, timeout: float) -> None:
        raise error

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", get_hf_file_metadata)


def refusal(kind: type[Exception]) -> Exception:
    response = SimpleNamespace(headers={}, request=None, status_code=404)
    return kind("404", response=response)


def test_what_cannot_be_had_is_one_message_for_each_reason(tmp_path, monkeypatch, capsys):
    for error, part in (
        (
            ConnectionError("no route"),
            "cannot be reached (no route); where it can, run hf download",
        ),
        (TimeoutError("timed out"), "cannot be reached (timed out)"),
        (refusal(RepositoryNotFoundError), "no such repository, or it is private"),
        (refusal(GatedRepoError), "asks for consent: give it at https://huggingface.co/owner/tiny"),
        (refusal(RemoteEntryNotFoundError), "there is no config.json in it"),
    ):
        failing(monkeypatch, error)
        with pytest.raises(InputError, match=re.escape(part)) as found:
            hub("owner/tiny")
        assert str(found.value).startswith("model.name=owner/tiny: ")
        assert "\n" not in str(found.value)
    photo(tmp_path / "photo.png")
    line = f"predict input=photo.png output=out model=hub model.name=owner/tiny {ON_CPU}"
    assert run_command(line, tmp_path) == 2
    assert capsys.readouterr().err == f"error: {found.value}\n"
    # Without it the images would be scaled in another way.
    publish(tmp_path / "whole")
    cached = hugging_face_cache(tmp_path, "owner/half")
    shutil.copy(tmp_path / "whole" / "config.json", cached)
    failing(monkeypatch, ConnectionError("no route"))
    with pytest.raises(InputError, match=r"preprocessor_config\.json is not in the local cache"):
        hub("owner/half")
    (tmp_path / "empty").mkdir()
    for name, part in ((tmp_path / "empty", "no config.json in it"), ("a b/c", "neither a folder")):
        with pytest.raises(InputError, match=part):
            hub(str(name))


def test_what_does_not_segment_or_is_broken_is_refused(tmp_path):
    library = pytest.importorskip("transformers")
    folder = tmp_path / "model"
    publish(folder)
    good = (folder / "config.json").read_text()
    config = json.loads(good)
    for change, part in (
        ({"model_type": "bert"}, "model_type is 'bert'"),
        ({"id2label": None}, "no id2label"),
        ({"attn_implementation": "somebody/kernel"}, "attn_implementation"),
        ({"backbone": "resnet50"}, "must not choose"),
        ({"depths": [2, 1, 1, 1]}, "does not segment: .* tensors"),
    ):
        (folder / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(InputError, match=part):
            hub(str(folder))
    (folder / "config.json").write_text("[1, 2")
    with pytest.raises(InputError, match="is no JSON"):
        hub(str(folder))
    (folder / "config.json").write_text(good)
    classes = {i: f"breed {i}" for i in range(1000)}  # of ImageNet
    encoder = library.SegformerModel(library.SegformerConfig(**SEGFORMER, id2label=classes))
    encoder.save_pretrained(tmp_path / "encoder")
    with pytest.raises(InputError, match=r"does not segment: .*decode_head"):
        hub(str(tmp_path / "encoder"))
    (folder / "model.safetensors").write_bytes(b"<!DOCTYPE html>")
    with pytest.raises(InputError, match="cannot load"):
        hub(str(folder))
