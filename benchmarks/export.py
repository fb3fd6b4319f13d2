"""What a network runs at in other runtimes: images per second, and the mean IoU that is left.

    python train.py output_dir=runs/demo          # unless make demo has
    python benchmarks/export.py runs/demo         # takes five minutes on two cores

The checkpoint is exported to ONNX and to OpenVINO, in float32 and int8. Then each of them, and
PyTorch in bfloat16 and float32, segments the test images of the checkpoint's data through
`Segmenter`, in processes of their own that take turns; so argmax is the same for all.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from seg_torch import Segmenter, hardware
from seg_torch.checkpoints import checkpoint
from seg_torch.checkpoints.trusted import DATA, instantiate_trusted
from seg_torch.metrics import ConfusionMatrix, scores

COMMAND = [sys.executable, "-m", "seg_torch", "export"]
SIDES = {  # name -> settings of the export, precision
    "PyTorch bfloat16": ([], "bf16-mixed"),
    "PyTorch float32": ([], "32-true"),
    "ONNX Runtime float32": (["format=onnx"], "32-true"),
    "OpenVINO float32": (["format=openvino"], "32-true"),
    "OpenVINO int8": (["format=openvino", "int8=true"], "32-true"),
}
SECONDS = 5  # of measuring in each process


def measure(path: str, run: str, precision: str) -> dict[str, float]:
    """Images per second, and the mean IoU, of a checkpoint or an exported file."""
    hardware.reuse_memory()  # as predict.py does
    settings = checkpoint.read(run)[checkpoint.KEY]["data"]
    dataset = instantiate_trusted(settings, ("seg_torch",), DATA).dataset("test")
    samples = [dataset[i] for i in range(min(len(dataset), 100))]
    segmenter = Segmenter.load(path, device="cpu", precision=precision)
    matrix = ConfusionMatrix(len(segmenter.labels))
    with segmenter.inference.autocast():
        for image, mask in samples:
            found = torch.from_numpy(segmenter.predict(image).mask)
            matrix.update(found[None], torch.as_tensor(mask)[None])
        count, start = 0, time.perf_counter()
        while time.perf_counter() - start < SECONDS:
            segmenter.predict(samples[count % len(samples)][0])
            count += 1
        rate = count / (time.perf_counter() - start)
    return {"rate": rate, "mean_iou": scores(matrix.compute())["mean_iou"].item()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", help="folder of a run, or a checkpoint")
    parser.add_argument("--rounds", type=int, default=3)
    # One process: the file, and the precision.
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        path, precision = arguments.measure
        print(json.dumps(measure(path, arguments.run, precision)))
        return
    with tempfile.TemporaryDirectory() as folder:
        files = {}
        for name, (settings, _) in SIDES.items():
            files[name] = arguments.run
            if settings:
                suffix = ".onnx" if "format=onnx" in settings else ".xml"
                files[name] = str(Path(folder, name.replace(" ", "_") + suffix))
                places = [f"checkpoint={arguments.run}", f"output={files[name]}"]
                subprocess.run([*COMMAND, *places, *settings], check=True, timeout=600)
        found: dict[str, list[dict[str, float]]] = {name: [] for name in SIDES}
        for _ in range(arguments.rounds):
            for name, (_, precision) in SIDES.items():
                command = [sys.executable, __file__, arguments.run, "--measure"]
                run = subprocess.run(
                    [*command, files[name], precision],
                    check=True,
                    stdout=subprocess.PIPE,
                    text=True,
                    timeout=600,
                )
                found[name].append(json.loads(run.stdout.splitlines()[-1]))
    table = Table("runtime", "images per second", "from - to", "mean IoU", title=arguments.run)
    for name, measured in found.items():
        rates = sorted(m["rate"] for m in measured)
        middle, ends = f"{statistics.median(rates):.1f}", f"{rates[0]:.1f} - {rates[-1]:.1f}"
        table.add_row(name, middle, ends, f"{measured[0]['mean_iou']:.4f}")
    Console().print(table)


if __name__ == "__main__":
    main()
