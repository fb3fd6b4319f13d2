"""Whether a trial knows what a run takes: seconds and memory, predicted and true.

    python benchmarks/trial.py [--only NAME ...] [--device cpu|cuda] [--seconds 10]
    python benchmarks/trial.py --dry-run

SEG_TORCH_DATA holds camvid and clothing-co-parsing. Each configuration is tried in a process of its
own for so many seconds; then another process trains with it for two epochs with validation and
test, some 40 seconds of steps. The seconds are those of the whole process, of which the prediction
knows the part before the trial by its own. The memory of a run on a CPU is that of the process and
what its workers have for themselves, looked at every fifth of a second (Linux); on a GPU that of
the tensors, as the run tells it. Writes `trial.json`. Leave the machine alone meanwhile.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import hydra

from seg_torch import hardware
from seg_torch.cli.overrides import complete_overrides
from seg_torch.files import CONFIG_FOLDER

EPOCHS, BATCHES = 2, 8  # validation batches, and those of the test
CAMVID = ("data=camvid", "data.augment.crop=[176,240]")
UNET = ("model.encoder=tf_efficientnet_lite0", "model.weights=null")
SMALL = (*CAMVID, *UNET)
CLOTHING = ("data=clothing", *UNET, "data.dataset.limit=200", "data.batch_size=4")
SEGFORMER = ("model=segformer", "model.weights=null")
RUNS = {
    "unet 176x240": SMALL,
    "unet 352x480": ("data=camvid", *UNET),
    "unet 176x240, cached": (*SMALL, "data.cache=ram", "data.batch_size=4"),
    "unet 176x240, accumulate 2": (*SMALL, "trainer.accumulate_grad_batches=2"),
    "unet 176x240, bf16": (*SMALL, "trainer.precision=bf16-mixed", "data.batch_size=4"),
    "unet 176x240, ema, ce_dice": (*SMALL, "ema=0.999", "loss=ce_dice", "data.num_workers=1"),
    "unet resnet34 176x240": (*CAMVID, "model.encoder=resnet34", "model.weights=null"),
    "deeplabv3 176x240": (*CAMVID, "model=deeplabv3", "model.weights=null", "data.batch_size=2"),
    "segformer 256x256": ("data=camvid", "data.augment.crop=[256,256]", *SEGFORMER),
    "shapes": ("data=shapes", "experiment=shapes"),
    "clothing, 2 workers": (*CLOTHING, "data.num_workers=2", "data.augment.crop=[256,256]"),
    "clothing 416x288, cached": (*CLOTHING, "data.resize=[416,288]", "data.cache=ram"),
}
DRY = ("data=shapes", "data.dataset.size=64", "data.dataset.train=40", "model=unet_random")


def compose(overrides: Sequence[str]) -> Any:
    with hydra.initialize_config_dir(str(CONFIG_FOLDER), version_base="1.3"):
        return hydra.compose("train", complete_overrides("train", overrides))


def predict(overrides: Sequence[str], seconds: float, epoch_seconds: float, started: float) -> dict:
    """Try a run, and choose steps that take about so many seconds in each epoch.

    Args:
        overrides: Settings of the run.
        seconds: Of the trial.
        epoch_seconds: Of the steps of an epoch.
        started: When this process was started, by `time.time()`.
    """
    from seg_torch.configuration import instantiate
    from seg_torch.data.sampling import EpochSampler
    from seg_torch.distributed import Processes
    from seg_torch.planning.trial import trial

    cfg = compose(overrides)
    processes, data = Processes(cfg.trainer), instantiate(cfg.data)
    data.check_files()
    before = time.time() - started
    found = trial(cfg, data, processes, seconds)
    accumulated = cfg.trainer.accumulate_grad_batches
    batches = len(EpochSampler(len(data.dataset("train")), data.batch_size, 0))
    steps = max(1, min(round(epoch_seconds / found.step_seconds), batches // accumulated))
    scored = [
        min(len(data.dataset(split)), BATCHES * data.eval_batch_size) for split in ("val", "test")
    ]
    epoch = steps * found.step_seconds + scored[0] * found.val_seconds + found.epoch_seconds
    total = found.start_seconds + EPOCHS * epoch + scored[1] * found.test_seconds
    return {
        **found._asdict(),
        "seconds": before + total,
        "batches": steps * accumulated,
        "took": time.time() - started - before,
    }


def run(overrides: Sequence[str], batches: int, device: str) -> tuple[float, int]:
    """Return the seconds of a run, and the bytes of memory that it took at most."""
    peak = 0
    with tempfile.TemporaryDirectory() as folder:
        limits = [f"trainer.limit_{split}_batches={BATCHES}" for split in ("val", "test")]
        limits += [f"trainer.limit_train_batches={batches}", f"trainer.max_epochs={EPOCHS}"]
        line = [sys.executable, "-m", "seg_torch", "train", "recipe=null", *overrides, *limits]
        started = time.time()
        process = subprocess.Popen([*line, f"output_dir={folder}/run"], stdout=subprocess.DEVNULL)
        while process.poll() is None:
            with suppress(OSError):  # it has just ended
                peak = max(peak, memory(process.pid))
            time.sleep(0.2)
        seconds = time.time() - started
        if process.returncode:
            raise SystemExit(f"{' '.join(overrides)} failed")
        if device == "cuda":
            with open(Path(folder, "run/times.csv"), newline="") as file:
                peak = max(int(1e9 * float(row["memory_gb"])) for row in csv.DictReader(file))
    return seconds, peak


def memory(pid: int) -> int:
    """Return the bytes that a process and its children take, what they share once (Linux)."""
    from seg_torch.planning.trial import memory_of

    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return memory_of(pid, [int(child) for child in children])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="*", choices=RUNS, default=list(RUNS))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--dry-run", action="store_true", help="one tiny run, to see that it works")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks"))
    parser.add_argument("--predict", help=argparse.SUPPRESS)  # in a process of its own
    arguments = parser.parse_args()
    if arguments.predict:
        print(json.dumps(predict(*json.loads(arguments.predict))))
        return
    runs = {"dry run": DRY} if arguments.dry_run else {name: RUNS[name] for name in arguments.only}
    seconds, epoch_seconds = (1.0, 2.0) if arguments.dry_run else (arguments.seconds, 20.0)
    table = []
    print(f"{'':28} {'seconds':>21}        {'GB':>18}      trial")
    for name, given in runs.items():
        overrides = [*given, f"trainer.accelerator={arguments.device}", "trainer.devices=1"]
        task = json.dumps([overrides, seconds, epoch_seconds, time.time()])
        line = [sys.executable, __file__, "--predict", task]
        output = subprocess.run(line, check=True, stdout=subprocess.PIPE, text=True).stdout
        found = json.loads(output.splitlines()[-1])
        true_seconds, true_bytes = run(overrides, found["batches"], arguments.device)
        ratios = found["seconds"] / true_seconds, found["peak_bytes"] / true_bytes
        table.append(
            {"name": name, "true_seconds": true_seconds, "true_bytes": true_bytes, **found}
        )
        print(
            f"{name:28} {found['seconds']:7.1f} {true_seconds:7.1f} {ratios[0]:6.2f}"
            f"     {found['peak_bytes'] / 1e9:6.2f} {true_bytes / 1e9:6.2f} {ratios[1]:6.2f}"
            f"     {found['took']:5.1f} s",
            flush=True,
        )
    arguments.output.mkdir(parents=True, exist_ok=True)
    content = {"cores": hardware.available_cpus(), "device": arguments.device, "runs": table}
    (arguments.output / "trial.json").write_text(json.dumps(content, indent=2))


if __name__ == "__main__":
    main()
