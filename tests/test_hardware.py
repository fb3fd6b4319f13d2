"""What the hardware is set to."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from seg_torch import hardware
from seg_torch.errors import InputError

# Pages that the system had to provide for tensors of 64 MB, after a few to settle.
PROGRAM = """
import resource, sys, torch
from seg_torch.hardware import reuse_memory
if sys.argv[1] == "reuse":
    reuse_memory()
faults = []
for i in range(60):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(1 << 24)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(sum(faults[40:]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="a setting of glibc")
def test_freed_memory_is_used_again_without_asking_the_system():
    command = [sys.executable, "-c", PROGRAM]
    usual, reused = (
        int(subprocess.run([*command, how], check=True, stdout=subprocess.PIPE).stdout)
        for how in ("usual", "reuse")
    )
    assert usual > 0, "nothing to gain here"
    assert reused < usual / 10


# A convolution for 300 widths of its input, and for the first one again.
MANY_SIZES = """
import os, sys, torch
from seg_torch.hardware import forget_shapes
convolution = torch.nn.Conv2d(3, 16, 3)
if sys.argv[1] == "few":
    forget_shapes()
os.environ["ONEDNN_VERBOSE"] = "profile_create"
with torch.no_grad():
    for width in [*range(100, 400), 100]:
        convolution(torch.zeros(1, 3, 80, width))
"""


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch without oneDNN")
def test_e63_code_for_few_sizes_of_images_is_kept():
    command = [sys.executable, "-c", MANY_SIZES]
    # Another test may have set it in this process.
    environment = {k: v for k, v in os.environ.items() if k != "ONEDNN_PRIMITIVE_CACHE_CAPACITY"}
    for how, last in (("usual", "cache_hit"), ("few", "cache_miss")):
        log = subprocess.run(
            [*command, how], check=True, capture_output=True, text=True, env=environment
        ).stdout
        made = [line for line in log.splitlines() if ",convolution," in line]
        if len(made) != 301:
            pytest.skip("another library does the convolutions here")
        assert f"create:{last}" in made[-1]


def device(monkeypatch, name: str) -> None:
    """As on a machine with a CUDA GPU, with Apple's, or with none (`cpu`)."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: name == "cuda")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: name == "mps")


@pytest.mark.parametrize(
    ("machine", "asked", "expected"),
    [
        ("cuda", "auto", "cuda"),
        ("cuda", "gpu", "cuda"),
        ("cuda", "cpu", "cpu"),
        ("mps", "auto", "mps"),
        ("mps", "gpu", "mps"),
        ("mps", "cpu", "cpu"),
        ("cpu", "auto", "cpu"),
        ("cpu", "tpu", "tpu"),  # Lightning knows more
    ],
)
def test_d19_gpu_means_the_one_of_this_machine(monkeypatch, machine, asked, expected):
    device(monkeypatch, machine)
    assert hardware.accelerator(asked) == expected


@pytest.mark.parametrize(
    ("machine", "asked"), [("cpu", "gpu"), ("cpu", "cuda"), ("cpu", "mps"), ("mps", "cuda")]
)
def test_d19_a_device_that_is_not_there_is_refused(monkeypatch, machine, asked):
    device(monkeypatch, machine)
    with pytest.raises(InputError, match=f"accelerator={asked}: PyTorch finds no such device"):
        hardware.accelerator(asked)


@pytest.mark.parametrize(
    ("machine", "capability", "instructions", "expected"),
    [
        ("cuda", (9, 0), False, "bf16-mixed"),
        ("cuda", (8, 0), False, "bf16-mixed"),
        ("cuda", (7, 5), True, "16-mixed"),  # emulates bfloat16
        ("mps", None, True, "32-true"),
        ("cpu", None, True, "bf16-mixed"),
        ("cpu", None, False, "32-true"),
    ],
)
def test_auto_is_the_fastest_precision_of_the_device(
    monkeypatch, machine, capability, instructions, expected
):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: instructions)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert hardware.resolve_precision("auto", machine) == expected


@pytest.mark.parametrize(
    ("asked", "expected"), [(32, "32-true"), ("bf16", "bf16-mixed"), ("16-true", "16-true")]
)
def test_precisions_have_lightnings_names(asked, expected):
    assert hardware.resolve_precision(asked, "cpu") == expected


def test_an_unknown_precision_is_refused_with_the_known_ones():
    with pytest.raises(InputError, match=r"precision=8: use one of auto, 32-true, bf16-mixed"):
        hardware.resolve_precision(8, "cpu")


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_precision_holds_inside_any_other(precision):
    expected = torch.float32 if precision == "32-true" else torch.bfloat16
    matrix = torch.ones(4, 4)
    for outer in ("32-true", "bf16-mixed"):
        with hardware.autocast(outer, "cpu"), hardware.autocast(precision, "cpu"):
            assert (matrix @ matrix).dtype == expected


class Copied:
    """In the place of a tensor: tells how it is copied."""

    def __init__(self, pinned: bool) -> None:
        self.pinned = pinned

    def is_pinned(self) -> bool:
        return self.pinned

    def to(self, device: torch.device, non_blocking: bool) -> tuple[str, bool]:
        return device.type, non_blocking


@pytest.mark.parametrize("name", ["cuda", "mps", "xpu", "cpu"])
@pytest.mark.parametrize("pinned", [True, False])
def test_e08_only_copies_of_pinned_memory_to_cuda_are_not_waited_for(name, pinned):
    copied = hardware.to_device(Copied(pinned), torch.device(name))
    assert copied == (name, name == "cuda" and pinned)


def test_e08_there_is_no_other_place_that_does_not_wait():
    package = Path(hardware.__file__).parent
    files = [p for p in package.rglob("*.py") if "non_blocking" in p.read_text(encoding="utf-8")]
    assert files == [package / "hardware.py"]
