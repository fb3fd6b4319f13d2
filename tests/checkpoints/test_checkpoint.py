"""Checkpoints: everything is in them, and nothing in them is run."""

import codecs
import os
import pickle
import resource
import sys
import zipfile
from collections import OrderedDict
from io import BytesIO
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi
from omegaconf import OmegaConf
from torch import nn

from seg_torch import Segmenter, models
from seg_torch.checkpoints import checkpoint, trusted
from seg_torch.checkpoints.hub import HUB
from seg_torch.commands.evaluate import evaluate
from seg_torch.errors import InputError
from seg_torch.evaluation.setup import stored_settings
from seg_torch.files import CONFIG_FOLDER
from seg_torch.labels import Labels
from seg_torch.models import unet
from seg_torch.models.network import Network
from seg_torch.models.weights import read_state_dict

LABELS = Labels(("a", "b", "c"))
UNET = {
    "_target_": "seg_torch.models.unet",
    "encoder": "resnet18",
    "weights": "imagenet",  # as it was trained; loading must not want to download them again
    "decoder_channels": [16, 16, 16, 8, 8],
}


class Own(nn.Module):
    """A model of somebody else's."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, num_classes, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


OWN = {"_target_": f"{__name__}.Own"}


def saved(path: Path, model: dict, network: Network, data: dict | None = None) -> Path:
    content = {
        "state_dict": {f"network.{k}": v for k, v in network.state_dict().items()},
        checkpoint.KEY: checkpoint.describe(network, LABELS, model, data or {}, None),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path)
    return path


@pytest.mark.promise(22)
def test_a_checkpoint_alone_gives_the_same_logits(tmp_path):
    torch.manual_seed(0)
    options = {k: v for k, v in UNET.items() if not k.startswith("_")} | {"weights": None}
    network = Network(unet(3, **options), mean=(0.1, 0.2, 0.3), std=(1, 2, 3)).eval()
    path = saved(tmp_path / "a.ckpt", UNET, network)
    segmenter = Segmenter.load(path, device="cpu")
    images = torch.randint(0, 256, (1, 3, 40, 56), dtype=torch.uint8)
    with torch.inference_mode():
        assert torch.equal(segmenter.network(images)["out"], network(images)["out"])
    assert segmenter.labels == LABELS
    assert (segmenter.labels.palette == LABELS.palette).all()


def test_a_checkpoint_knows_the_run_in_whose_folder_it_lies(tmp_path, monkeypatch):
    run = tmp_path / "runs" / "first"
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.yaml").touch()
    (tmp_path / "copied.ckpt").touch()
    assert checkpoint.run_of(run) == run
    assert checkpoint.run_of(run / "checkpoints" / "last.ckpt") == run
    assert checkpoint.run_of(tmp_path / "copied.ckpt") is None
    assert checkpoint.run_of("hf://owner/name") is None
    monkeypatch.chdir(run / "checkpoints")
    assert checkpoint.run_of("best.ckpt") == run


def test_the_folder_of_a_run_stands_for_its_best_checkpoint(tmp_path):
    for name in ("best", "last"):
        network = Network(Own(3))
        nn.init.constant_(network.model.layer.bias, 5 if name == "best" else 7)
        saved(tmp_path / f"run/checkpoints/{name}.ckpt", OWN, network)
    network = Segmenter.load(tmp_path / "run", trust=[__name__]).network
    assert (network.model.layer.bias == 5).all()


def test_a_folder_without_a_best_checkpoint_is_refused_with_what_it_would_hold(tmp_path):
    saved(tmp_path / "checkpoints/last.ckpt", OWN, Network(Own(3)))
    with pytest.raises(InputError, match=rf"checkpoint={tmp_path}: .*checkpoints/best\.ckpt"):
        Segmenter.load(tmp_path)


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "torch.load",
        "torch.hub.load",
        "torch.utils.cpp_extension.load",
        "hydra.utils.get_method",
        "torchvision.models.segmentation.fcn_resnet50",  # which downloads a backbone
        "torchvision.datasets.VOCSegmentation",
        "seg_torch.datasets.write_folder",
        "seg_torch.models.weights.download_from_hugging_face",
        "seg_torch.models.weights.torch.hub.load",
        "seg_torch.models.unet.__globals__",
        "seg_torch.models.network.log.info",
        "seg_torch.models.network.log.name.join",
        "seg_torch.modelsevil.run",
        "builtins.eval",
    ],
)
def test_a_target_that_is_no_model_of_seg_torch_is_refused(tmp_path, target):
    for config in (
        {"_target_": target},
        {**UNET, "encoder": {"_target_": target}},
        {**UNET, "decoder_channels": [16, ({"a": {"_target_": target}},)]},
    ):
        path = saved(tmp_path / "a.ckpt", config, Network(Own(3)))
        with pytest.raises(InputError, match="none of seg_torch's own"):
            Segmenter.load(path)


@pytest.mark.parametrize("target", ["seg_torch.models.gone", "seg_torch.models..unet"])
def test_a_target_that_is_not_there_is_one_message(tmp_path, target):
    path = saved(tmp_path / "a.ckpt", {"_target_": target}, Network(Own(3)))
    with pytest.raises(InputError, match="not installed"):
        Segmenter.load(path, trust=["seg_torch"])


def test_a_model_of_ones_own_needs_trust(tmp_path):
    path = saved(tmp_path / "a.ckpt", OWN, Network(Own(3)))
    with pytest.raises(InputError, match=rf"trust=\[{__name__}\]"):
        Segmenter.load(path)
    assert isinstance(Segmenter.load(path, trust=[__name__]).network.model, Own)


@pytest.mark.parametrize("group", ["model", "data"])
def test_all_that_our_configurations_name_is_known(group):
    for path in (CONFIG_FOLDER / group).glob("*.yaml"):
        config = OmegaConf.load(path)
        nodes = [config, config.get("dataset", {})]
        targets = {node["_target_"] for node in nodes if "_target_" in node}
        known = trusted.MODELS | {HUB} if group == "model" else trusted.DATA
        assert targets <= known  # what is published is in no checkpoint


HF = "seg_torch.models.transformers"
BEIT = {"model_type": "beit", "out_indices": [3, 5, 7, 11]}


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"_args_": [3]}, "_args_, an order to Hydra"),
        ({"_recursive_": False}, "_recursive_, an order to Hydra"),
        ({"_convert_": "object"}, "_convert_, an order to Hydra"),
        ({"decoder_channels": [16, {"_mode_": "call"}]}, "_mode_, an order to Hydra"),
        ({"_partial_": True}, "not a module"),
        ({"_target_": None}, "wants to run None"),
        ({"_target_": ["os", "system"]}, "none of seg_torch's own"),
        ({"nothing": 1}, "unexpected keyword argument 'nothing'"),
        ({"encoder": {"a": "resnet18"}}, "no attribute 'split'"),
        ({"encoder": torch.zeros(3)}, "not plain data"),
        # What published weights it would fetch is in the file, or not:
        ({"_target_": "seg_torch.models.lraspp"}, "do not fit its own model"),
        # More than the file holds, on the way to more than the machine has:
        ({"decoder_channels": [30_000] * 5}, "larger than the weights in the file"),
        ({"decoder_channels": [10**12] * 5}, "numbers that no network has"),
        ({"decoder_channels": [10**600, 0.5]}, "numbers that no network has"),
        ({"decoder_channels": [float("nan")] * 5}, "numbers that no network has"),
        ({"encoder": "convnext_xxlarge"}, "larger than the weights in the file"),
        # Without a limit, as many layers are made as the file says:
        ({"_target_": HF, "config": {**BEIT, "num_hidden_layers": 10**5}}, "larger"),
        ({"_target_": HF, "config": {"model_type": "segformer", "num_labels": 10**9}}, "numbers"),
        # Names that the libraries look up on the Hub, or as a folder:
        ({"_target_": "seg_torch.models.smp", "encoder": "tu-hf-hub:x/y"}, "does not have"),
        ({"_target_": "seg_torch.models.smp", "encoder": "tu-local-dir:x"}, "does not have"),
        ({"encoder": "hf-hub:x/y"}, "does not have"),
        ({"_target_": HF, "config": {"model_type": "upernet", "backbone": "x/y"}}, "name files"),
        ({"_target_": HF, "config": {"model_type": "dpt", "backbone": "resnet18"}}, "name files"),
        ({"_target_": HF, "config": {"model_type": "dpt", "auto_map": {"a": "x/y"}}}, "name files"),
    ],
)
def test_a_model_that_asks_for_more_than_its_weights_is_refused(
    tmp_path, monkeypatch, settings, reason
):
    for asking in ("model_info", "repo_exists", "hf_hub_download"):
        monkeypatch.setattr(HfApi, asking, lambda *_, **__: pytest.fail("it asked the Hub"))
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda *_, **__: pytest.fail("it"))
    whole = str(settings.get("_target_")).startswith("seg_torch")
    model = settings if whole else {**UNET, **settings}
    path = saved(tmp_path / "a.ckpt", model, Network(Own(3)))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InputError, match=reason) as refusal:
        Segmenter.load(path, device="cpu")
    assert "\n" not in str(refusal.value)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 700_000, f"{grown} kB"


SECRET = "${oc.env:SEG_TORCH_TEST_SECRET}"


@pytest.fixture
def environment_reads(monkeypatch) -> list[str]:
    """The names of the environment variables that are looked at because of a file."""
    monkeypatch.setenv("SEG_TORCH_TEST_SECRET", "resnet18")
    reads: list[str] = []
    plain = os._Environ.__getitem__
    monkeypatch.setattr(
        os._Environ, "__getitem__", lambda self, key: (reads.append(key), plain(self, key))[1]
    )
    return reads


@pytest.mark.parametrize(
    "settings",
    [
        {"encoder": SECRET},
        {"decoder_channels": [16, 16, [SECRET]]},
        {"extra": {SECRET: 1}},
        {"extra": ({"_target_": "seg_torch.models.unet", "encoder": f"x{SECRET}"},)},
        {"_target_": SECRET},
    ],
)
def test_d28_a_model_that_would_read_the_environment_is_refused(
    tmp_path, environment_reads, settings
):
    path = saved(tmp_path / "a.ckpt", {**UNET, **settings}, Network(Own(3)))
    with pytest.raises(InputError, match="interpolation") as refusal:
        Segmenter.load(path, device="cpu")
    assert "resnet18" not in str(refusal.value)
    assert "SEG_TORCH_TEST_SECRET" not in environment_reads


@pytest.mark.parametrize("where", ["root", "dataset"])
def test_d28_data_that_would_read_the_environment_are_refused(
    compose, tmp_path, environment_reads, where
):
    data = {
        "_target_": "seg_torch.data.SegmentationDataModule",
        "dataset": {"_target_": "seg_torch.datasets.shapes", "_partial_": True},
        "root": None,
    }
    if where == "root":
        data["root"] = SECRET
    else:
        data["dataset"]["size"] = [SECRET]
    path = saved(tmp_path / "a.ckpt", OWN, Network(Own(3)), data)
    options = (f"checkpoint={path}", f"trust=[{__name__}]", "trainer.accelerator=cpu")
    with pytest.raises(InputError, match="interpolation"):
        evaluate(compose("evaluate", *options, f"output_dir={tmp_path / 'e'}"))
    assert "SEG_TORCH_TEST_SECRET" not in environment_reads


def test_a_model_that_cannot_be_made_without_values_is_counted_as_it_is_made():
    class Asking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.zeros(1).item()  # fails on the device "meta"
            self.layer = nn.Linear(1000, 1000)

    assert trusted.made_within(Asking, 1_100_000).layer.weight.device.type == "cpu"
    with pytest.raises(InputError, match="larger than the weights"):
        trusted.made_within(Asking, 1_000_000)


@pytest.mark.parametrize(
    ("builder", "settings"),
    [
        ("deeplabv3", {"backbone": "resnet50"}),
        ("fcn", {"backbone": "resnet50"}),
        ("hrnet", {"encoder": "hrnet_w18_small"}),
        ("lraspp", {}),
        ("smp", {"encoder": "resnet18"}),
        ("transformers", {"config": {"model_type": "segformer"}}),
        ("unet", {"encoder": "resnet18"}),
        ("unet_transposed", {}),
    ],
)
def test_every_family_can_be_made_without_memory(builder, settings):
    with torch.device("meta"):
        model = getattr(models, builder)(3, **settings, weights=None)
    assert all(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))


def test_what_is_filled_as_it_is_made_is_counted_without_memory():
    devices = []

    class Filled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            values = torch.ones(20_000)
            devices.append(values.device.type)
            self.values = nn.Parameter(values)

    with pytest.raises(InputError, match="larger than the weights"):
        trusted.made_within(Filled, 20_000)
    assert devices == ["meta"]
    assert trusted.made_within(Filled, 30_000).values.device.type == "cpu"


@pytest.mark.parametrize(
    ("part", "value", "reason"),
    [
        ("labels", None, "not subscriptable"),
        ("labels", {"names": ["a"]}, "it has no 'palette'"),
        ("labels", {"names": ["a"] * 256, "palette": []}, "256 class names"),
        ("labels", {"names": ["a" * 10**6], "palette": [[0, 0, 0]]}, "longer than 200"),
        ("labels", {"names": ["a\x1b[2J"], "palette": [[0, 0, 0]]}, "control characters"),
        ("labels", {"names": ["a\ud800"], "palette": [[0, 0, 0]]}, "control characters"),
        ("preprocessing", {"mean": [0], "std": [1, 1], "resize": None}, "mean and std"),
        ("preprocessing", {"mean": "abc", "std": "abc", "resize": None}, "mean and std"),
        ("preprocessing", {"mean": [0], "std": [1], "resize": [10**9, 10**9]}, "resize is"),
        ("preprocessing", {"mean": [10**400], "std": [1], "resize": None}, "mean and std"),
        ("preprocessing", {"mean": [0], "std": [1], "resize": []}, "resize is"),
        ("preprocessing", {"mean": [0], "std": [1], "resize": [32]}, "resize is"),
        ("preprocessing", {"mean": [0], "std": [1], "resize": [32, 32.5]}, "resize is"),
        ("preprocessing", {"mean": [0], "std": [1], "resize": 0}, "resize is 0: two sides"),
        ("preprocessing", {"mean": [0], "std": [1], "resize": 8193}, "resize is 8193: two sides"),
        ("preprocessing", {"mean": [0], "std": [1], "resize": 64.0}, "float"),
        ("preprocessing", {"mean": [0], "std": [1], "resize": True}, "bool"),
        ("model", [], "no mappings"),
        ("data", "x", "no mappings"),
        ("state_dict", {"network.a": "x"}, "not tensors by name"),
        ("state_dict", {1: torch.zeros(1)}, "not tensors by name"),
        ("state_dict", [torch.zeros(1)], "not tensors by name"),
        # One value that stands for a million million:
        ("state_dict", {"a": torch.zeros(1).expand(10**6, 10**6)}, "larger weights than it holds"),
    ],
)
def test_a_description_of_another_kind_is_refused_with_one_line(tmp_path, part, value, reason):
    path = saved(tmp_path / "a.ckpt", UNET, Network(Own(3)))
    content = torch.load(path)
    (content if part == "state_dict" else content[checkpoint.KEY])[part] = value
    torch.save(content, path)
    with pytest.raises(InputError, match=rf"a\.ckpt: .*{reason}") as refusal:
        checkpoint.read(path)
    assert "\n" not in str(refusal.value)


def test_many_views_of_one_tensor_are_more_than_the_file_holds(tmp_path):
    path = saved(tmp_path / "a.ckpt", UNET, Network(Own(3)))
    values = torch.zeros(10**5)
    for views, fits in (([values] * 50, True), ([values[i:] for i in range(50)], False)):
        content = torch.load(path)
        content["state_dict"] = {str(i): view for i, view in enumerate(views)}
        torch.save(content, path)
        if fits:  # weights that two layers share
            checkpoint.read(path)
        else:
            with pytest.raises(InputError, match="larger weights than it holds"):
                checkpoint.read(path)


def test_data_of_a_checkpoint_fetch_nothing_and_start_few_processes(compose, tmp_path, monkeypatch):
    module = sys.modules["seg_torch.datasets.published.pet"]
    monkeypatch.setattr(module, "OxfordIIITPet", lambda *_, **__: pytest.fail("download"))
    data = {
        "_target_": "seg_torch.data.SegmentationDataModule",
        "dataset": {"_target_": "seg_torch.datasets.pet", "_partial_": True, "download": True},
        "download": True,
        "root": str(tmp_path / "new"),
        "num_workers": 10**6,
        "augment": {"_target_": "os.mkdir", "path": "x"},  # which evaluating does not need
    }
    path = saved(tmp_path / "a.ckpt", OWN, Network(Own(3)), data)
    options = (f"checkpoint={path}", f"trust=[{__name__}]", "trainer.accelerator=cpu")
    options = (*options, f"output_dir={tmp_path / 'e'}")
    with pytest.raises(InputError, match=r"was not found in .*new"):
        evaluate(compose("evaluate", *options))
    assert not (tmp_path / "new").exists()

    data["dataset"] = {"_target_": "seg_torch.datasets.shapes", "_partial_": True, "size": 10**9}
    data["root"] = None
    saved(path, OWN, Network(Own(3)), data)
    with pytest.raises(InputError, match="shapes of size 1000000000"):
        evaluate(compose("evaluate", *options))
    own = torch.load(path)[checkpoint.KEY]["data"]
    settings = stored_settings(own, {})
    assert settings["num_workers"] <= os.cpu_count()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        ({"_target_": "seg_torch.models.unet"}, "none of seg_torch's own"),
        ({"_target_": "seg_torch.datasets.shapes", "split": "val"}, "cannot be made as it says"),
        ({"_target_": "seg_torch.data.SegmentationDataModule"}, "cannot be made as it says"),
        (
            {
                "_target_": "seg_torch.data.SegmentationDataModule",
                "dataset": {"_target_": "seg_torch.datasets.shapes", "_partial_": True},
                "_partial_": True,
            },
            "no data module",
        ),
    ],
)
def test_data_that_are_no_data_module_are_refused(compose, tmp_path, data, reason):
    network = Network(unet(3, "resnet10t", None))
    model = {"_target_": "seg_torch.models.unet", "encoder": "resnet10t"}
    path = saved(tmp_path / "a.ckpt", model, network, data)
    options = (f"checkpoint={path}", f"output_dir={tmp_path / 'e'}", "trainer.accelerator=cpu")
    with pytest.raises(InputError, match=reason):
        evaluate(compose("evaluate", *options))


class Asks:
    """Unpickling it would take memory."""

    def __init__(self, *call) -> None:
        self.call = call

    def __reduce__(self):
        return self.call[0], self.call[1:]


# What PyTorch itself lets a file call.
GREEDY = [
    (bytearray, 10**12),
    (torch.storage.UntypedStorage, 10**12),
    (torch.Tensor, 10**6, 10**6),
    (torch._utils._rebuild_meta_tensor_no_storage, torch.float32, (10**9,), (1,), False),
    (codecs.encode, "a" * 100, "idna"),
]


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("call", GREEDY, ids=lambda call: call[0].__name__)
def test_a_pickle_may_name_nothing_but_tensors(tmp_path, monkeypatch, call, zipped):
    path = tmp_path / "a.pth"
    content = {"a": torch.zeros(2), "b": Asks(*call)}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("it was unpickled"))
    with pytest.raises(InputError, match=r"a\.pth .*it names .*, which no weights need"):
        read_state_dict(path)


@pytest.mark.parametrize("zipped", [True, False])
def test_all_that_weights_consist_of_is_read(tmp_path, zipped):
    weights = {f"{t}": torch.ones(3).to(t) for t in (torch.float32, torch.bfloat16, torch.int64)}
    weights = OrderedDict({**weights, "parameter": nn.Parameter(torch.ones(2, 2))})
    torch.save(weights, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    found = read_state_dict(tmp_path / "a.pth")
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[k], v) and found[k].dtype == v.dtype for k, v in weights.items())


@pytest.mark.parametrize("zipped", [True, False])
def test_a_tensor_does_not_reach_beyond_its_file(tmp_path, zipped):
    """PyTorch before 2.10 read on in the memory of the process."""
    path = tmp_path / "a.pth"
    torch.save({"a": torch.zeros(77)}, path, _use_new_zipfile_serialization=zipped)
    content = path.read_bytes()
    assert content.count(b"K\x4d") == 2  # the numbers of values of the storage and the tensor
    path.write_bytes(content.replace(b"K\x4d", b"M\xff\xff"))
    if zipped:
        with zipfile.ZipFile(BytesIO(content)) as original, zipfile.ZipFile(path, "w") as forged:
            for name in original.namelist():
                forged.writestr(name, original.read(name).replace(b"K\x4d", b"M\xff\xff"))
    with pytest.raises(InputError, match=r"a\.pth "):
        read_state_dict(path)


class Payload:
    """Unpickling it would make a folder."""

    def __init__(self, folder) -> None:
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


@pytest.mark.promise(7)
def test_unpickling_runs_nothing(tmp_path):
    torch.save({"state_dict": Payload(tmp_path / "ran")}, tmp_path / "a.ckpt")
    (tmp_path / "b.ckpt").write_bytes(pickle.dumps(Payload(tmp_path / "ran")))
    for name in ("a.ckpt", "b.ckpt"):
        with pytest.raises(InputError, match=name):
            checkpoint.read(tmp_path / name)
    assert not (tmp_path / "ran").exists()


def test_what_would_unpack_to_more_than_the_file_is_refused_before_it_is_unpacked(
    tmp_path, monkeypatch
):
    """PyTorch itself would unpack it: 2 MB of zeros took 4.9 GB of memory."""
    path = saved(tmp_path / "a.ckpt", OWN, Network(Own(3)))
    with zipfile.ZipFile(path) as original:
        content = {name: original.read(name) for name in original.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as bomb:
        for name, value in content.items():
            bomb.writestr(name, value + bytes(1 << 24) * name.endswith("data.pkl"))
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("it was unpacked"))
    with pytest.raises(InputError, match=r"a\.ckpt: .*would unpack to 16,7\d\d,\d\d\d bytes"):
        checkpoint.read(path)


def test_a_configuration_without_end_is_refused(tmp_path):
    """A few bytes of references: ten times ten times ... the same list, or a list in itself."""
    node: list = ["x"]
    for _ in range(12):
        node = [node] * 10
    loop: list = []
    loop.append(loop)
    for extra in (node, loop):
        path = saved(tmp_path / "a.ckpt", {**UNET, "extra": extra}, Network(Own(3)))
        with pytest.raises(InputError, match="more than 100,000 values"):
            Segmenter.load(path)


def test_a_checkpoint_that_was_cut_off_is_refused_by_name(tmp_path):
    path = saved(tmp_path / "a.ckpt", UNET, Network(Own(3)))
    content = path.read_bytes()
    for length in (0, 1, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(InputError, match=r"a\.ckpt: not a checkpoint, or cut off"):
            checkpoint.read(path)


def test_damaged_files_are_refused_with_one_line(tmp_path):
    """Bytes changed at random raise errors of a dozen types in zipfile, pickle and PyTorch."""
    path = saved(tmp_path / "a.ckpt", UNET, Network(Own(3)))
    with zipfile.ZipFile(path) as original:
        content = {name: original.read(name) for name in original.namelist()}
    generator = torch.Generator().manual_seed(0)
    messages = []
    for _ in range(100):
        with zipfile.ZipFile(path, "w") as damaged:
            for name, value in content.items():
                array = bytearray(value)
                if name.endswith("data.pkl"):
                    places = torch.randint(0, len(array), (4,), generator=generator)
                    for place in places.tolist():
                        array[place] = int(torch.randint(0, 256, (), generator=generator))
                damaged.writestr(name, bytes(array))
        try:
            checkpoint.read(path)
        except InputError as error:
            messages.append(str(error))
    assert len(messages) > 50
    assert all(str(path) in message and "\n" not in message for message in messages)


def test_a_weight_that_is_not_what_was_written_is_refused(tmp_path):
    """One bit of a copy is enough for other masks; PyTorch reads it without a word."""
    path = saved(tmp_path / "a.ckpt", OWN, Network(Own(3)))
    content = bytearray(path.read_bytes())
    bias = torch.load(path)["state_dict"]["network.model.layer.bias"].numpy().tobytes()
    content[content.index(bias) + 2] ^= 0x40
    path.write_bytes(content)
    assert torch.load(path)["state_dict"]["network.model.layer.bias"].abs().max() > 0
    with pytest.raises(InputError, match=r"a\.ckpt: .*it is damaged .*: copy it again"):
        checkpoint.read(path)


def test_weights_of_another_model_are_refused(tmp_path):
    path = saved(tmp_path / "a.ckpt", UNET, Network(Own(3)))
    with pytest.raises(InputError, match="do not fit its own model"):
        Segmenter.load(path)
