"""What predict.py does: photographs in; masks, pictures and a table of them out.

A folder is worked through by three parties at once: threads that read photographs, the network, and
threads that draw and write. What is finished is noted in a journal, a line a file, once its outputs
are complete; so a run that was stopped, in whatever way, goes on where it was.
"""

from __future__ import annotations

import csv
import hashlib
import json
import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from hydra.utils import instantiate
from lightning import Fabric
from lightning.fabric.strategies import DDPStrategy
from lightning.fabric.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from rich.progress import track
from torchvision.transforms.v2 import functional as tvf

from seg_torch.commands import video
from seg_torch.datasets.voc import VOC_LABELS
from seg_torch.errors import InputError
from seg_torch.files import PARTIAL, write_atomically
from seg_torch.hardware import autocast, available_cpus, reuse_memory
from seg_torch.images import pixel_limit, read_image
from seg_torch.labels import Labels
from seg_torch.models.network import Network
from seg_torch.polygons import write_coco
from seg_torch.segmenter import JPEG_QUALITY, SUFFIXES, Segmentation, Segmenter
from seg_torch.visualize import legend, side_by_side

log = logging.getLogger(__name__)

# Notes what has been done, in the output folder.
JOURNAL = ".journal"
PRETRAINED = ("deeplabv3", "fcn")

T = TypeVar("T")
R = TypeVar("R")
Record = dict[str, Any]


def predict(cfg: DictConfig) -> int:
    """Predicts `cfg.input` into `cfg.output`. Returns the number of files that failed."""
    if cfg.input is None or cfg.output is None:
        raise InputError("predict.py needs input=FILE-OR-FOLDER and output=FOLDER")
    source, output, outputs = Path(cfg.input), Path(cfg.output), list(cfg.save)
    unknown = [name for name in outputs if name not in {"legend", *SUFFIXES}]
    if unknown:
        raise InputError(
            f"save: there is no {', '.join(map(str, unknown))}; choose of legend, "
            f"{', '.join(SUFFIXES)}"
        )
    film = source.is_file() and source.suffix.lower() in video.SUFFIXES
    files = {} if film else find_images(source, output)
    fabric = _fabric(cfg.trainer)
    if fabric.device.type == "cpu":
        reuse_memory()
    segmenter, beside = _segmenter(cfg, fabric.device), _beside(cfg, fabric.device)
    saved = [name for name in outputs if name != "legend"]
    if beside is not None and "side_by_side" not in saved:
        saved.append("side_by_side")
    run = _fingerprint(cfg)
    batch_size = _batch_size(cfg.batch_size, fabric.device)
    shrink = partial(_shrink, resize=cfg.resize, crop=cfg.crop)
    if film:
        target = output / f"{source.stem}.mp4"
        with autocast(fabric.device):  # as below
            frames = video.predict_video(segmenter, source, target, batch_size, shrink)
        log.info("%d frames labelled: %s", frames, target)
        return 0
    fabric.launch()  # not before all settings are known to be right, lest every process complain

    if fabric.is_global_zero:
        _prepare(output, segmenter.labels if "legend" in outputs else None)
        before = _complete(files, output, saved, run) if cfg.resume else []
        _replace_journal(output, before)
        if before:
            log.info("%d of %d pictures were labelled before", len(before), len(files))
    fabric.barrier()
    done = {record["name"] for record in _read_journal(output)}
    todo = [name for name in files if name not in done][fabric.global_rank :: fabric.world_size]
    fabric.barrier()  # all have read the journal before anyone adds to it
    try:
        # An outer autocast keeps the weights that it has cast from one picture to the next.
        with pixel_limit(cfg.max_pixels), autocast(fabric.device):
            _label(
                {name: files[name] for name in todo},
                segmenter,
                beside,
                read=lambda path: shrink(read_image(path)),
                save=partial(_save, output, saved, _titles(cfg)),
                note=partial(_note, output / JOURNAL / f"{fabric.global_rank}.jsonl", run),
                batch_size=batch_size,
                probabilities="probabilities" in saved,
                progress=fabric.is_global_zero,
            )
    except KeyboardInterrupt:
        log.info("interrupted: the same command goes on with what is left")
        raise
    fabric.barrier()
    if not fabric.is_global_zero:
        return 0
    return _finish(files, source, output, "polygons" in saved, segmenter.labels)


def find_images(path: Path, output: Path | None = None) -> dict[str, Path]:
    """The picture files at or below `path`, by the name of their outputs.

    The name is the path below the folder without its extension, or with it where another file
    would get the same name.

    Args:
        path: of a picture or a folder.
        output: folder whose pictures are left out, since it may lie below `path`.

    Raises:
        InputError: there is no such path, or no picture below it.
    """
    if path.is_file():
        return {path.stem: path}
    if not path.is_dir():
        raise InputError(f"input={path}: no such file or folder")
    readable = {e for e, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    inside = path / "." if output is None else output
    files = [
        file
        for file in sorted(path.rglob("*"))
        if file.suffix.lower() in readable
        and file.is_file()
        and not (output is not None and file.resolve().is_relative_to(inside.resolve()))
    ]
    if not files:
        raise InputError(f"input={path}: no pictures below this folder")
    full = [file.relative_to(path).as_posix() for file in files]
    stems = [file.relative_to(path).with_suffix("").as_posix() for file in files]
    # A stem may also be what another file is called: "a.jpg" is the stem of "a.jpg.png".
    taken = Counter(stems) + Counter(set(full))
    return {
        stem if taken[stem] == 1 else name: file
        for stem, name, file in zip(stems, full, files, strict=True)
    }


class _Photo(NamedTuple):
    name: str
    path: Path
    image: np.ndarray
    seconds: float  # that reading it took


def _label(
    files: dict[str, Path],
    segmenter: Segmenter,
    beside: Segmenter | None,
    read: Callable[[Path], np.ndarray],
    save: Callable[[str, Segmentation, Segmentation | None], None],
    note: Callable[[Record], None],
    batch_size: int,
    probabilities: bool,
    progress: bool,
) -> None:
    """Labels files: reading, network and writing go on at the same time.

    Few pictures are in memory at a time, however many there are: each queue holds two for each of
    its threads.

    Args:
        files: by name.
        segmenter: labels them.
        beside: labels them, too.
        read: file to picture; raises InputError where it cannot.
        save: writes the results of one picture.
        note: is told of each file that is complete or has failed.
        batch_size: pictures that go through the network together.
        probabilities: keep them in the results.
        progress: show a bar.
    """

    def open_photo(item: tuple[str, Path]) -> _Photo | Record:
        name, path = item
        start = time.perf_counter()
        try:
            return _Photo(name, path, read(path), time.perf_counter() - start)
        except InputError as error:
            return {"name": name, "error": str(error)}

    def write(
        photo: _Photo, result: Segmentation, other: Segmentation | None, seconds: float
    ) -> Record:
        start = time.perf_counter()
        save(photo.name, result, other)
        height, width = result.mask.shape
        return {
            "name": photo.name,
            "file": _stamp(photo.path),
            "width": width,
            "height": height,
            "confidence": result.confidence,
            "areas": list(result.areas().values()),
            "seconds": photo.seconds + seconds + time.perf_counter() - start,
        }

    def photos(opened: Iterable[_Photo | Record]) -> Iterator[_Photo]:
        # Drawn ten times a second, as rich does by default, the bar takes a hundredth of the time.
        shown = track(opened, "labelling", len(files), disable=not progress, refresh_per_second=2)
        for photo in shown:
            if isinstance(photo, _Photo):
                yield photo
            else:
                note(photo)

    threads = min(8, available_cpus())
    writing: deque[Future[Record]] = deque()
    with ThreadPoolExecutor(threads) as readers, ThreadPoolExecutor(threads) as writers:
        opened = _ahead(readers, open_photo, files.items(), 2 * threads)
        for group in _same_size(photos(opened), batch_size):
            start = time.perf_counter()
            # A batch is filled up, since convolutions round by the number of pictures in it.
            images = [photo.image for photo in group]
            images += images[-1:] * (batch_size - len(group))
            results = segmenter.predict_batch(images, probabilities)
            others = beside.predict_batch(images) if beside else [None] * batch_size
            seconds = (time.perf_counter() - start) / len(group)
            for photo, result, other in zip(group, results, others, strict=False):
                writing.append(writers.submit(write, photo, result, other, seconds))
            while len(writing) > 2 * threads or (writing and writing[0].done()):
                note(writing.popleft().result())
        while writing:
            note(writing.popleft().result())


def _ahead(
    pool: ThreadPoolExecutor, function: Callable[[T], R], items: Iterable[T], count: int
) -> Iterator[R]:
    """`map` in threads, in order, at most `count` items ahead of whoever takes the results."""
    pending: deque[Future[R]] = deque()
    for item in items:
        pending.append(pool.submit(function, item))
        if len(pending) >= count:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def _same_size(photos: Iterable[_Photo], count: int) -> Iterator[list[_Photo]]:
    """Groups of up to `count` pictures of one size; at most twice as many wait for company."""
    groups: dict[tuple[int, ...], list[_Photo]] = {}
    for photo in photos:
        group = groups.setdefault(photo.image.shape, [])
        group.append(photo)
        if len(group) == count:
            yield groups.pop(photo.image.shape)
        elif sum(map(len, groups.values())) >= 2 * count:
            yield groups.pop(next(iter(groups)))
    yield from groups.values()


def _shrink(photo: np.ndarray, resize: int | None, crop: int | None) -> np.ndarray:
    """A picture with its shorter side at `resize`, cut to the middle `crop`; null: as it is."""
    if resize is None and crop is None:
        return photo
    image = Image.fromarray(photo)
    if resize is not None:
        image = tvf.resize(image, [resize])
    if crop is not None:
        image = tvf.center_crop(image, [crop])
    return np.array(image)


def _save(
    output: Path,
    outputs: list[str],
    titles: tuple[str, str],
    name: str,
    result: Segmentation,
    other: Segmentation | None,
) -> None:
    """Writes the outputs of one picture; two models side by side where there is another result."""
    if other is None:
        result.save(output, name, outputs)
        return
    result.save(output, name, [kind for kind in outputs if kind != "side_by_side"])
    masks = {title: (r.mask, r.labels) for title, r in zip(titles, (result, other), strict=True)}
    picture = side_by_side(result.image, masks)
    path = _output_path(output, "side_by_side", name)
    write_atomically(path, partial(picture.save, quality=JPEG_QUALITY))


def _output_path(output: Path, kind: str, name: str) -> Path:
    return output / kind / f"{name}{SUFFIXES[kind]}"


def _prepare(output: Path, labels: Labels | None) -> None:
    """Makes the folder, with a legend if labels are given, and clears what a killed run left."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        for partial_file in output.rglob(f"{PARTIAL}*"):
            partial_file.unlink()
        if labels is not None:
            write_atomically(output / "legend.png", legend(labels).save)
    except OSError as error:
        raise InputError(f"output={output}: cannot be written: {error.strerror}") from None


def _note(journal: Path, run: str, record: Record) -> None:
    # A line that a killed run left half-written must not swallow this one.
    with journal.open("a") as file:
        file.write("\n" + json.dumps({"run": run, **record}) + "\n")


def _read_journal(output: Path) -> Iterator[Record]:
    for journal in sorted((output / JOURNAL).glob("*.jsonl")):
        with journal.open() as file:
            for line in file:
                try:
                    yield json.loads(line)
                except json.JSONDecodeError:  # empty, or a half-written one
                    continue


def _complete(files: dict[str, Path], output: Path, outputs: list[str], run: str) -> list[Record]:
    """The journal's records of files that need not be done again.

    Their outputs are there and were made with the same settings from the same file.
    """
    return [
        record
        for record in _read_journal(output)
        if record["run"] == run
        and "error" not in record
        and record["name"] in files
        and record["file"] == _stamp(files[record["name"]])
        and all(_output_path(output, kind, record["name"]).exists() for kind in outputs)
    ]


def _replace_journal(output: Path, records: list[Record]) -> None:
    journal = output / JOURNAL / "before.jsonl"
    text = "".join(json.dumps(record) + "\n" for record in records)
    write_atomically(journal, lambda path: Path(path).write_text(text))
    for other in journal.parent.glob("*.jsonl"):
        if other != journal:
            other.unlink()


def _stamp(path: Path) -> list[int]:
    """Tells whether a file is still the same: its size and when it was changed."""
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]


def _fingerprint(cfg: DictConfig) -> str:
    """Of all settings that decide what a mask looks like, the weights included."""
    plain: Any = OmegaConf.to_container(cfg, resolve=True)
    digest = hashlib.sha256()
    for key in ("beside", "resize", "crop", "tile", "tta", "batch_size"):
        digest.update(f"{key}={plain[key]};".encode())
    if cfg.checkpoint is None:
        digest.update(json.dumps(plain["model"], sort_keys=True).encode())
    for weights in (cfg.checkpoint, cfg.beside, cfg.model.get("weights")):
        if weights is not None and Path(weights).is_file():
            digest.update(Path(weights).read_bytes())
    return digest.hexdigest()[:16]


def _finish(
    files: dict[str, Path], source: Path, output: Path, polygons: bool, labels: Labels
) -> int:
    """Writes what covers all files, names those that failed, and returns their number."""
    records = {record["name"]: record for record in _read_journal(output)}
    done = {name: records[name] for name in files if "error" not in records[name]}
    failures = [records[name]["error"] for name in files if "error" in records[name]]
    shown = {name: _file_name(path, source) for name, path in files.items()}

    def write_table(path: str) -> None:
        with open(path, "w", newline="") as file:
            writer = csv.writer(file)
            columns = ("file", "width", "height", "mean_confidence", "seconds")
            writer.writerow([*columns, *labels.names])
            for name, record in done.items():
                size = (record["width"], record["height"])
                shares = [f"{share:.6f}" for share in record["areas"]]
                confidence, seconds = f"{record['confidence']:.6f}", f"{record['seconds']:.3f}"
                writer.writerow([shown[name], *size, confidence, seconds, *shares])

    def pictures() -> Iterator[tuple[str, int, int, list[Record]]]:
        for name, record in done.items():
            content = json.loads(_output_path(output, "polygons", name).read_text())
            for annotation in content["annotations"]:
                del annotation["id"], annotation["image_id"]
            yield shown[name], record["width"], record["height"], content["annotations"]

    write_atomically(output / "predictions.csv", write_table)
    if polygons:
        write_atomically(
            output / "polygons.json", lambda path: write_coco(path, pictures(), labels)
        )
    log.info("%d of %d pictures labelled: %s", len(done), len(files), output)
    for failure in failures:
        log.error("failed: %s", failure)
    return len(failures)


def _fabric(trainer: DictConfig) -> Fabric:
    """Lightning's processes, one for each device; `launch` starts those that are missing."""
    settings = {"accelerator": trainer.accelerator, "devices": trainer.devices}
    try:
        fabric = Fabric(**settings)
        if fabric.world_size > 1:
            # Processes wait for the slowest one at the end, for which half an hour may be little.
            fabric = Fabric(**settings, strategy=DDPStrategy(timeout=timedelta(days=30)))
    except (ValueError, TypeError, MisconfigurationException) as error:
        raise InputError(f"trainer: {error}") from error
    return fabric


def _segmenter(cfg: DictConfig, device: torch.device) -> Segmenter:
    settings = _settings(cfg)
    if cfg.checkpoint is not None:
        return Segmenter.load(cfg.checkpoint, device, cfg.trust, **settings)
    if _titles(cfg)[0] not in PRETRAINED:
        raise InputError(
            f"{cfg.model._target_} comes without weights that label pictures: give "
            f"checkpoint=FILE, or use model={' or model='.join(PRETRAINED)}"
        )
    model = instantiate(cfg.model, num_classes=len(VOC_LABELS))
    return Segmenter(Network(model), VOC_LABELS, device=device, **settings)


def _beside(cfg: DictConfig, device: torch.device) -> Segmenter | None:
    """The second model, by its name or a checkpoint."""
    if cfg.beside is None:
        return None
    if cfg.beside in PRETRAINED:
        return Segmenter.pretrained(cfg.beside, device=device, **_settings(cfg))
    return Segmenter.load(cfg.beside, device, cfg.trust, **_settings(cfg))


def _titles(cfg: DictConfig) -> tuple[str, str]:
    """What the two models are called."""
    name = cfg.model._target_.split(".")[-1] if cfg.checkpoint is None else cfg.checkpoint
    return str(name), str(cfg.beside)


def _settings(cfg: DictConfig) -> dict[str, Any]:
    """`tile`, and `tta` as the Segmenter takes it."""
    words = cfg.tta.split(",") if isinstance(cfg.tta, str) else list(cfg.tta or [])
    try:
        scales = [float(word) for word in words if word != "flip"] or [1.0]
    except ValueError:
        raise InputError(
            f"tta={cfg.tta}: expected flip, factors, or both, such as tta=[flip,0.75,1.0,1.25]"
        ) from None
    return {"tile": cfg.tile, "scales": scales, "flip": "flip" in words}


def _batch_size(wished: int | None, device: torch.device) -> int:
    if wished is not None and (not isinstance(wished, int) or wished < 1):
        raise InputError(f"batch_size={wished}: expected at least 1")
    # A processor is as fast with one picture at a time, which leaves its caches less to hold.
    return wished or (1 if device.type == "cpu" else 8)


def _file_name(path: Path, source: Path) -> str:
    return path.name if path == source else path.relative_to(source).as_posix()
