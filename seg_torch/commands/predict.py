"""What predict.py does: segment images and write masks, overlays and a table of them.

Images that go through the network together have one size. On a GPU such batches are planned from
the headers of all files, before the first one is read, so that a run that was stopped and goes on
makes the same batches. The batches are then worked through by three parties at once: threads that
read images, the network, and threads that draw and write. The journal gets a line for each file
whose outputs are complete; so a run goes on where it was, in whatever way it was stopped.
"""

from __future__ import annotations

import csv
import hashlib
import json
import logging
import os
import shutil
import socket
import time
import uuid
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from datetime import timedelta
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from filelock import FileLock, Timeout
from hydra.utils import instantiate
from lightning import Fabric
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from rich.progress import track
from torchvision.transforms.v2 import functional as tvf

from seg_torch import hardware
from seg_torch.checkpoints import checkpoint
from seg_torch.checkpoints.hub import HUB
from seg_torch.datasets.base import list_files
from seg_torch.datasets.folder import write_classes
from seg_torch.datasets.published.voc import VOC_LABELS
from seg_torch.distributed import as_launched, check_launcher
from seg_torch.drawing.coco import write_coco
from seg_torch.drawing.visualize import legend, side_by_side
from seg_torch.errors import InputError, check_choice
from seg_torch.files import PARTIAL, write_atomically
from seg_torch.images.format import RGB, ImageFormat
from seg_torch.images.geotiff import write_geotiff
from seg_torch.images.read import IMAGE_SUFFIXES, pixel_limit
from seg_torch.labels import Labels
from seg_torch.models.network import Network
from seg_torch.prediction import video
from seg_torch.prediction.inference import parse_tta
from seg_torch.prediction.segmenter import JPEG_QUALITY, SUFFIXES, Segmentation, Segmenter

log = logging.getLogger(__name__)

# The folder below the output folder with the records of what is complete, and the lock.
JOURNAL = ".journal"
PRETRAINED = ("deeplabv3", "fcn")
THREADS = min(8, hardware.available_cpus())  # that read; as many write

Files = dict[str, Path]  # by name
Batch = list[str]  # the names of its files
Results = tuple[Segmentation, ...]  # of one image, by each of the models
Record = dict[str, Any]


def predict(cfg: DictConfig) -> int:
    """Segment `cfg.input`, an image, a folder of images or a video, into the folder `cfg.output`.

    Returns:
        The number of files that failed.

    Raises:
        InputError: A setting, the input or the output folder cannot be used.
    """
    source, output, kinds = Path(cfg.input), Path(cfg.output), _kinds(cfg)
    is_video = source.is_file() and source.suffix.lower() in video.SUFFIXES
    files = {} if is_video else find_images(source, output)
    fabric = _fabric(cfg.trainer, max(1, len(files)))
    if fabric.device.type == "cpu":
        hardware.reuse_memory()
    segmenters = _segmenters(cfg, fabric.device)
    if is_video:
        return _predict_video(cfg, segmenters[0]) if fabric.is_global_zero else 0
    format = segmenters[0].format
    if format.files:
        files = find_images(source, output, format.files)

    group = _connect(fabric)  # not before all settings are known to be right, or the others wait
    lock = FileLock(output / JOURNAL / "lock")
    run = _run_id(cfg)
    try:
        # Around all images, so that the weights are cast to another precision only once.
        with pixel_limit(cfg.max_pixels), segmenters[0].inference.autocast():
            prepare = partial(_prepare, cfg, files, segmenters, run, lock, fabric.world_size)
            all_batches, journals = _on_first_rank(fabric, group, prepare)
            batches = all_batches[fabric.global_rank :: fabric.world_size]
            journal = output / JOURNAL / journals[fabric.global_rank]
            _check_shared(journal, files, batches)
            _wait_for_all(group)  # if one of them does not share the disk, the others end as well
            _predict_files(
                files,
                batches,
                read=lambda path: _shrink(segmenters[0].read(path), cfg.resize, cfg.crop),
                segment=partial(
                    _segment, segmenters, "probabilities" in kinds, "confidence" in kinds
                ),
                save=partial(_save, output, kinds, (model_name(cfg), str(cfg.beside)), format),
                note=partial(_note, journal, run),
                progress=fabric.is_global_zero,
            )
        _wait_for_all(group)
        return _finish(cfg, files, segmenters[0].labels) if fabric.is_global_zero else 0
    except KeyboardInterrupt:
        if fabric.local_rank == 0:
            log.info("interrupted: the same command goes on with what is left")
        raise
    finally:
        lock.release()


def find_images(path: Path, output: Path | None = None, endings: Sequence[str] = ()) -> Files:
    """Return the image files at or below a path, by the name of their outputs.

    The name is the path below the folder without its suffix, or with it where another file would
    get the same name. Names differ in more than upper and lower case, since many file systems do
    not tell `A.png` from `a.png`.

    Args:
        path: Of an image or a folder.
        output: Folder whose images are left out, since it may lie below `path`.
        endings: Of the files that are one image, if there are several; the first of them counts,
            and the name is what comes before.

    Raises:
        InputError: There is no such path, or no image below it.
    """
    if path.is_file():
        return {path.name.removesuffix(endings[0]) if endings else path.stem: path}
    if not path.is_dir():
        raise InputError(f"input={path}: no such file or folder")
    suffixes = (endings[0].lower(),) if endings else IMAGE_SUFFIXES
    files = [path / name for name in list_files(path, suffixes)]
    if output is not None:
        outputs, folders = output.resolve(), {file.parent for file in files}
        own = {folder for folder in folders if folder.resolve().is_relative_to(outputs)}
        files = [file for file in files if file.parent not in own]
    if not files:
        raise InputError(f"input={path}: no images below this folder")
    full = [_file_name(file, path) for file in files]
    if endings:
        return {name[: -len(endings[0])]: file for name, file in zip(full, files, strict=True)}
    stems = [file.relative_to(path).with_suffix("").as_posix() for file in files]
    # A stem may also be what another file is called: "a.jpg" is the stem of "a.jpg.png".
    taken = Counter(stem.casefold() for stem in stems) + Counter({n.casefold() for n in full})
    names: dict[str, tuple[str, Path]] = {}
    for stem, name, file in zip(stems, full, files, strict=True):
        name = stem if taken[stem.casefold()] == 1 else name
        while name.casefold() in names:  # both A.jpg and a.jpg
            name += "~"
        names[name.casefold()] = (name, file)
    return dict(names.values())


def _predict_video(cfg: DictConfig, segmenter: Segmenter) -> int:
    target = Path(cfg.output) / f"{Path(cfg.input).stem}.mp4"
    shrink = partial(_shrink, resize=cfg.resize, crop=cfg.crop)
    with segmenter.inference.autocast():  # as for images
        frames = video.predict_video(segmenter, cfg.input, target, cfg.batch_size, shrink)
    log.info("%d frames segmented: %s", frames, target)
    return 0


# ---- Before the first image: where to go on, and in which batches


def _prepare(
    cfg: DictConfig,
    files: Files,
    segmenters: list[Segmenter],
    run: str,
    lock: FileLock,
    processes: int,
) -> tuple[list[Batch], list[str]]:
    """Lock the output folder and clear what a killed run left.

    Returns:
        The batches to do, and the name of a journal for each process.
    """
    output, kinds = Path(cfg.output), _kinds(cfg)
    try:
        (output / JOURNAL).mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
        # The lock is ours, so no run writes these files now.
        for folder in (JOURNAL, *kinds):
            for leftover in (output / folder).rglob(f"{PARTIAL}{'[0-9a-f]' * 32}*"):
                leftover.unlink(missing_ok=True)
        if "legend" in cfg.save:
            _write_summary(output, "legend.png", legend(segmenters[0].labels).save)
    except Timeout:
        raise InputError(f"output={output}: another run is writing into this folder") from None
    except OSError as error:
        raise InputError(f"output={output}: cannot be written: {error.strerror}") from None
    complete = _complete(files, output, kinds, run) if cfg.resume else {}
    batches = _plan(cfg, files, segmenters)
    # A batch goes through the network as a whole again, so that its outputs stay what they were.
    batches = [batch for batch in batches if not complete.keys() >= set(batch)]
    for name in chain.from_iterable(batches):
        complete.pop(name, None)
    journals = _replace_journals(output, complete.values(), processes)
    if complete:
        log.info("%d of %d images are complete already", len(complete), len(files))
    return batches, journals


def _plan(cfg: DictConfig, files: Files, segmenters: list[Segmenter]) -> list[Batch]:
    """Group files of one size, in the order in which the groups begin.

    Convolutions round differently for another number of images, but not for other images: a mask
    depends on the length of its batch, which is the same whenever the same files are planned.
    """
    if cfg.batch_size == 1 or (cfg.batch_size is None and segmenters[0].device.type == "cpu"):
        return [[name] for name in files]

    shrink = partial(_resized, resize=cfg.resize, crop=cfg.crop)

    def size(path: Path) -> tuple[int, ...] | None:
        stored = segmenters[0].format.size(path)
        # Tensors of device "meta" have a size, but no memory.
        return stored and shrink(torch.empty(3, *stored, device="meta")).shape[1:]

    with ThreadPoolExecutor(THREADS) as pool:
        sizes = list(pool.map(size, files.values()))
    batches: list[Batch] = []
    unfilled: dict[tuple[int, ...], Batch] = {}
    for name, shape in zip(files, sizes, strict=True):
        if shape is None:  # it will fail, and nothing else with it
            batches.append([name])
            continue
        if shape not in unfilled:
            batches.append(unfilled.setdefault(shape, []))
        unfilled[shape].append(name)
        limit = cfg.batch_size or min(segmenter.batch_size(*shape) for segmenter in segmenters)
        if len(unfilled[shape]) >= limit:
            del unfilled[shape]
    return batches


# ---- Reading, network and writing


class _Image(NamedTuple):
    name: str
    path: Path
    pixels: np.ndarray  # [H, W, C], as the model's format says
    seconds: float  # that reading it took


def _predict_files(
    files: Files,
    batches: list[Batch],
    read: Callable[[Path], np.ndarray],
    segment: Callable[[list[np.ndarray]], list[Results]],
    save: Callable[[_Image, Results], None],
    note: Callable[[Record], None],
    progress: bool,
) -> None:
    """Segment files while the next ones are read and the last ones are written.

    Few images are in memory at a time, however many there are: each of the two queues holds a batch
    and two images for each of its threads.

    Args:
        files: Paths by name.
        batches: The names of files that go through the network together.
        read: File to image; raises InputError where it cannot.
        segment: Images of one size to their results.
        save: Writes the results of one image.
        note: Is given the record of each file that is complete or has failed.
        progress: Show a bar.
    """
    names = list(chain.from_iterable(batches))
    length = 2 * THREADS + max(map(len, batches), default=0)
    writing: deque[Future[Record]] = deque()
    with ThreadPoolExecutor(THREADS) as readers, ThreadPoolExecutor(THREADS) as writers:
        opened = _ahead(readers, partial(_open, files, read), names, length)
        # Drawn ten times a second, as rich does by default, the bar takes 1 % of the time.
        shown = track(opened, "predicting", len(names), disable=not progress, refresh_per_second=2)
        for batch in batches:
            same_size: dict[tuple[int, ...], list[_Image]] = {}  # one, if headers tell the truth
            for image in islice(shown, len(batch)):
                if isinstance(image, _Image):
                    same_size.setdefault(image.pixels.shape, []).append(image)
                else:
                    note(image)
            for images in same_size.values():
                start = time.perf_counter()
                all_results = segment([image.pixels for image in images])
                seconds = (time.perf_counter() - start) / len(images)
                for image, results in zip(images, all_results, strict=True):
                    writing.append(writers.submit(_write, save, image, results, seconds))
            while len(writing) > length or (writing and writing[0].done()):
                note(writing.popleft().result())
        list(shown)  # nothing is left, but the bar ends with its iterator, not with the last image
        while writing:
            note(writing.popleft().result())


def _ahead(
    pool: ThreadPoolExecutor, function: Callable[[str], Any], names: Iterable[str], count: int
) -> Iterator[Any]:
    """Map in threads, in order, at most `count` items ahead of whoever takes the results."""
    rest = iter(names)
    pending = deque(pool.submit(function, name) for name in islice(rest, count))
    while pending:
        yield pending.popleft().result()
        pending.extend(pool.submit(function, name) for name in islice(rest, 1))


def _open(files: Files, read: Callable[[Path], np.ndarray], name: str) -> _Image | Record:
    start = time.perf_counter()
    try:
        return _Image(name, files[name], read(files[name]), time.perf_counter() - start)
    except InputError as error:
        return {"name": name, "error": str(error)}


def _shrink(pixels: np.ndarray, resize: int | None, crop: int | None) -> np.ndarray:
    """Resize and crop an image, uint8 [H, W, 3]."""
    if resize is None and crop is None:
        return pixels
    return np.array(_resized(Image.fromarray(pixels), resize, crop))


def _resized(image: Any, resize: int | None, crop: int | None) -> Any:
    """Bring the shorter side to `resize` and cut the middle `crop`; None: leave it as it is."""
    if resize is not None:
        image = tvf.resize(image, [resize])
    return image if crop is None else tvf.center_crop(image, [crop])


def _segment(
    segmenters: list[Segmenter], scores: bool, confidence_map: bool, images: list[np.ndarray]
) -> list[Results]:
    """Segment images of one size with each model; only the first is asked for probabilities."""
    first = segmenters[0].predict_batch(images, scores, confidence_map)
    others = [segmenter.predict_batch(images) for segmenter in segmenters[1:]]
    return list(zip(first, *others, strict=True))


def _write(
    save: Callable[[_Image, Results], None], image: _Image, results: Results, seconds: float
) -> Record:
    """Write the outputs of an image and return its record."""
    start = time.perf_counter()
    try:
        save(image, results)
    except InputError as error:
        return {"name": image.name, "error": str(error)}
    return {
        "name": image.name,
        "file": _stamp(image.path),
        "width": results[0].mask.shape[1],
        "height": results[0].mask.shape[0],
        "confidence": results[0].confidence,
        "areas": list(results[0].areas().values()),
        "seconds": image.seconds + seconds + time.perf_counter() - start,
    }


def _save(
    output: Path,
    kinds: list[str],
    titles: tuple[str, str],
    format: ImageFormat,
    image: _Image,
    results: Results,
) -> None:
    """Write the outputs of one image; `side_by_side` shows the results of all models."""
    ours = {"dataset", "geotiff"} | ({"side_by_side"} if len(results) > 1 else set())
    results[0].save(output, image.name, [kind for kind in kinds if kind not in ours])
    if "dataset" in kinds:
        endings = format.files or [image.path.suffix]
        for source, ending in zip(format.paths(image.path), endings, strict=True):
            copy = output / "dataset" / "images" / f"{image.name}{ending}"
            write_atomically(copy, partial(shutil.copyfile, source))
        write_atomically(_output_path(output, "dataset", image.name), results[0].save_mask)
    if "geotiff" in kinds:
        path = _output_path(output, "geotiff", image.name)
        mask, labels = results[0].mask, results[0].labels
        write_atomically(path, partial(write_geotiff, mask, labels, image.path))
    if len(results) > 1:
        masks = {title: (r.mask, r.labels) for title, r in zip(titles, results, strict=True)}
        drawn = side_by_side(results[0].image, masks)
        path = _output_path(output, "side_by_side", image.name)
        write_atomically(path, partial(drawn.save, quality=JPEG_QUALITY))


def _output_path(output: Path, kind: str, name: str) -> Path:
    if kind == "dataset":
        return output / "dataset" / "masks" / f"{name}.png"
    return output / kind / f"{name}{'.tif' if kind == 'geotiff' else SUFFIXES[kind]}"


# ---- The journal


def _note(journal: Path, run: str, record: Record) -> None:
    # A line that a killed run left half-written must not swallow this one.
    with journal.open("a", encoding="utf-8") as file:
        file.write("\n" + json.dumps({"run": run, **record}) + "\n")


def _read_journal(output: Path) -> Iterator[Record]:
    for journal in sorted((output / JOURNAL).glob("*.jsonl")):
        for line in journal.read_text(encoding="utf-8").splitlines():
            with suppress(json.JSONDecodeError):  # empty, or a half-written one
                yield json.loads(line)


def _complete(files: Files, output: Path, kinds: list[str], run: str) -> dict[str, Record]:
    """Return the journal's records of files that need not be done again, by name.

    Their outputs are there and were made with the same settings from the same file.
    """
    return {
        record["name"]: record
        for record in _read_journal(output)
        if record["run"] == run
        and "error" not in record
        and record["name"] in files
        and record["file"] == _stamp(files[record["name"]])
        and all(_output_path(output, kind, record["name"]).exists() for kind in kinds)
    }


def _replace_journals(output: Path, records: Iterable[Record], processes: int) -> list[str]:
    """Keep the records in one journal and return the names of new ones, one for each process.

    The new ones are made here and have names that were never used, so that a process that does not
    find its own writes to another disk, and what is left of a run whose first process died does not
    write into one of ours.
    """
    text = "".join(json.dumps(record) + "\n" for record in records)
    folder = output / JOURNAL
    write_atomically(
        folder / "before.jsonl", lambda path: Path(path).write_text(text, encoding="utf-8")
    )
    for journal in folder.glob("[0-9]*.jsonl"):
        journal.unlink()
    start = uuid.uuid4().hex
    journals = [f"{rank}-{start}.jsonl" for rank in range(processes)]
    for name in journals:
        (folder / name).touch()
    return journals


def _stamp(path: Path) -> list[int]:
    """Return the size of a file and when it was changed, to tell whether it is still the same."""
    return [path.stat().st_size, path.stat().st_mtime_ns]


def _run_id(cfg: DictConfig) -> str:
    """Return a hash of all settings that decide what a mask looks like, the weights included."""
    plain: Any = OmegaConf.to_container(cfg, resolve=True)
    settings = ["beside", "resize", "crop", "tile", "tta", "batch_size", "unknown"]
    settings += ["model"] if cfg.checkpoint is None else []
    values = [plain["trainer"]["precision"], *(plain[key] for key in settings)]
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode())
    for weights in (cfg.checkpoint, cfg.beside, cfg.model.get("weights"), cfg.model.get("name")):
        published = str(weights).startswith(checkpoint.HUB_SCHEME)
        path = checkpoint.locate(weights) if published else Path(weights or "")
        if weights and path.is_dir():  # of a run, or as on the Hub
            files = (path / "checkpoints" / "best.ckpt", path / "model.safetensors")
            path = next((file for file in files if file.is_file()), path)
        if path.is_file():
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


# ---- After the last image


def _finish(cfg: DictConfig, files: Files, labels: Labels) -> int:
    """Write what covers all files, name those that failed, and return their number."""
    output, source = Path(cfg.output), Path(cfg.input)
    records = {record["name"]: record for record in _read_journal(output)}
    done = {_file_name(files[n], source): records[n] for n in files if "error" not in records[n]}
    failures = [records[name]["error"] for name in files if "error" in records[name]]
    rows = sorted(done.items(), key=lambda r: r[1]["confidence"]) if cfg.sort == "doubt" else done
    _write_summary(output, "predictions.csv", partial(_write_table, dict(rows), labels))
    if "dataset" in cfg.save:
        write_classes(labels, output / "dataset")
    if "coco" in cfg.save:
        _write_summary(output, "coco.json", partial(_write_coco, done, labels, output))
    log.info("%d of %d images segmented: %s", len(done), len(files), output)
    for failure in failures:
        log.error("failed: %s", failure)
    return len(failures)


def _write_table(records: dict[str, Record], labels: Labels, path: str) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["file", "width", "height", "mean_confidence", "seconds", *labels.names])
        for name, record in records.items():
            row = [name, record["width"], record["height"], f"{record['confidence']:.6f}"]
            shares = [f"{share:.6f}" for share in record["areas"]]
            writer.writerow([*row, f"{record['seconds']:.3f}", *shares])


def _write_coco(records: dict[str, Record], labels: Labels, output: Path, path: str) -> None:
    """Write the annotations of all images, one after the other, from the files of each."""

    def images() -> Iterator[tuple[str, int, int, list[Record]]]:
        for name, record in records.items():
            content = json.loads(_output_path(output, "coco", record["name"]).read_bytes())
            yield name, record["width"], record["height"], content["annotations"]

    write_coco(path, images(), labels)


def _write_summary(output: Path, name: str, write: Callable[[str], object]) -> None:
    """Write a file of the output folder.

    It is first written among the journal's files: what a killed run leaves of it does not lie in a
    folder that may hold files of others.
    """
    draft = output / JOURNAL / name
    write(str(draft))
    os.replace(draft, output / name)


def _file_name(path: Path, source: Path) -> str:
    return path.name if path == source else path.relative_to(source).as_posix()


# ---- Settings


def _kinds(cfg: DictConfig) -> list[str]:
    """Return the outputs that are saved for each image, after a look at the settings."""
    choices = ["legend", *SUFFIXES, "geotiff", "dataset"]
    unknown = [str(kind) for kind in cfg.save if kind not in choices]
    if unknown:
        raise InputError(f"save: there is no {', '.join(unknown)}; choose of {', '.join(choices)}")
    for kind in {"dataset", "geotiff"} & set(cfg.save):
        if cfg.resize or cfg.crop:
            raise InputError(f"save=[{kind}] is about whole images: leave out resize and crop")
    check_choice("sort", cfg.sort, ("name", "doubt"))
    if cfg.batch_size is not None and (not isinstance(cfg.batch_size, int) or cfg.batch_size < 1):
        raise InputError(f"batch_size={cfg.batch_size}: expected at least 1")
    kinds = [kind for kind in cfg.save if kind != "legend"]
    if cfg.beside is not None and "side_by_side" not in kinds:
        kinds.append("side_by_side")
    return kinds


def _fabric(trainer: DictConfig, files: int) -> Fabric:
    """Return Lightning's processes, one for each device; `_connect` starts those that are missing.

    With `devices=auto` Lightning starts no more processes than there are files.
    """
    settings: Any = {key: trainer[key] for key in ("accelerator", "devices", "num_nodes")}
    settings["accelerator"] = hardware.accelerator(trainer.accelerator)
    settings = as_launched(settings)
    named = " ".join(f"{key}={value}" for key, value in settings.items())
    try:
        fabric = Fabric(**settings)
        environment = getattr(fabric.strategy, "cluster_environment", None)
        started_by_us = isinstance(environment, LightningEnvironment) and trainer.num_nodes == 1
        if trainer.devices == "auto" and started_by_us:
            settings["devices"] = min(fabric.world_size, files)
            fabric = Fabric(**settings)
        check_launcher(getattr(fabric.strategy, "num_processes", 1), settings["num_nodes"])
    except (
        ValueError,
        TypeError,
        ImportError,
        RuntimeError,
        MisconfigurationException,
    ) as error:
        raise InputError(f"{named}: {error}") from error
    return fabric


def _connect(fabric: Fabric) -> Any:
    """Start the processes that are missing; return the group in which they wait for each other.

    They give up after half an hour, Lightning's limit, if they do not find each other. The slowest
    one may take days longer than the others, so the group has a limit of its own. Its backend is
    Gloo also on GPUs: unlike NCCL, it notices at once that a process has died.
    """
    fabric.launch()
    if fabric.world_size == 1:
        return None
    return torch.distributed.new_group(timeout=timedelta(days=30), backend="gloo")


def _on_first_rank(fabric: Fabric, group: Any, function: Callable[[], Any]) -> Any:
    """Return the result of a function that only the first process calls.

    If it raises InputError, all processes end instead of waiting for the first one.
    """
    results: list[Any] = [None]
    if fabric.is_global_zero:
        try:
            results = [function()]
        except InputError as error:
            results = [error]
    if group is not None:
        torch.distributed.broadcast_object_list(results, src=0, group=group)
    if isinstance(results[0], InputError):
        raise results[0] if fabric.is_global_zero else SystemExit(2)
    return results[0]


def _check_shared(journal: Path, files: Files, batches: list[Batch]) -> None:
    """Refuse an input or output folder in which the first process sees other files."""
    missing = [name for name in chain.from_iterable(batches) if name not in files]
    if missing or not journal.exists():
        folder, name = ("input", missing[0]) if missing else ("output", journal)
        raise InputError(
            f"{folder}: {name} is there for the first process, but not on {socket.gethostname()}; "
            "input and output must lie on a disk that all machines share"
        )


def _wait_for_all(group: Any) -> None:
    if group is not None:
        torch.distributed.barrier(group)


def load_segmenter(cfg: DictConfig, device: torch.device) -> Segmenter:
    """Load the model of a configuration: its checkpoint or, without one, a published model.

    Raises:
        InputError: It cannot be loaded, or a setting is impossible.
    """
    settings = _model_settings(cfg, device)
    if cfg.checkpoint is not None:
        return Segmenter.load(cfg.checkpoint, trust=cfg.trust, **settings)
    if cfg.model._target_ == HUB:
        return Segmenter.from_hub(cfg.model.name, **settings)
    if model_name(cfg) in PRETRAINED:
        network = Network(instantiate(cfg.model, num_classes=len(VOC_LABELS)))
        return Segmenter(network, VOC_LABELS, **settings)
    raise InputError(
        f"{cfg.model._target_} comes without weights that segment images: give "
        f"checkpoint=FILE, or use model=hub or model={' or model='.join(PRETRAINED)}"
    )


def model_name(cfg: DictConfig) -> str:
    """Return what the model of a configuration is called."""
    if cfg.checkpoint is not None:
        return str(cfg.checkpoint)
    return str(cfg.model.name if cfg.model._target_ == HUB else cfg.model._target_.split(".")[-1])


def _model_settings(cfg: DictConfig, device: torch.device) -> dict[str, Any]:
    scales, flip = parse_tta(cfg.tta)
    return {
        "tile": cfg.tile,
        "precision": str(cfg.trainer.precision),
        "unknown": cfg.unknown,
        "scales": scales,
        "flip": flip,
        "device": device,
    }


def _segmenters(cfg: DictConfig, device: torch.device) -> list[Segmenter]:
    """Return the model and, where one is asked for, the second model."""
    first = load_segmenter(cfg, device)
    if first.format != RGB and (cfg.resize or cfg.crop):
        raise InputError("resize and crop are for models of RGB images")
    if cfg.beside is None:
        return [first]
    settings = _model_settings(cfg, device)
    if cfg.beside in PRETRAINED:
        second = Segmenter.pretrained(cfg.beside, **settings)
    else:
        second = Segmenter.load(cfg.beside, trust=cfg.trust, **settings)
    if first.format != second.format:
        raise InputError(f"beside={cfg.beside}: this model takes images of other channels")
    return [first, second]
