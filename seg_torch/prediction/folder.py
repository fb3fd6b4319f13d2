"""The images of a run of predict.py, and the folder in which it leaves their outputs.

The journal gets a line for each image whose outputs are complete; so a run goes on where it was, in
whatever way it was stopped. Several processes have one each.
"""

from __future__ import annotations

import csv
import hashlib
import json
import logging
import os
import socket
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from seg_torch.checkpoints import checkpoint
from seg_torch.datasets.base import list_files
from seg_torch.datasets.folder import write_classes
from seg_torch.distributed import Processes
from seg_torch.drawing.regions import write_coco
from seg_torch.drawing.visualize import legend
from seg_torch.errors import InputError
from seg_torch.files import PARTIAL, write_text
from seg_torch.folders import claimed
from seg_torch.images.read import IMAGE_SUFFIXES
from seg_torch.labels import Labels
from seg_torch.prediction.segmentation import output_path

log = logging.getLogger(__name__)

# The folder below the output folder with the records of what is complete.
JOURNAL = ".journal"

Files = dict[str, Path]  # by name
Batch = list[str]  # the names of its files
Record = dict[str, Any]


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
    files = list_files(path, suffixes)
    if output is not None:
        outputs, folders = output.resolve(), {(path / file).parent for file in files}
        written = {folder for folder in folders if folder.resolve().is_relative_to(outputs)}
        files = [file for file in files if (path / file).parent not in written]
    if not files:
        raise InputError(f"input={path}: no images below this folder")
    if endings:
        return {file[: -len(endings[0])]: path / file for file in files}
    stems = [Path(file).with_suffix("").as_posix() for file in files]
    # A stem may also be what another file is called: "a.jpg" is the stem of "a.jpg.png".
    counts = Counter(stem.casefold() for stem in stems) + Counter({f.casefold() for f in files})
    names: dict[str, tuple[str, Path]] = {}
    for stem, file in zip(stems, files, strict=True):
        name = stem if counts[stem.casefold()] == 1 else file
        while name.casefold() in names:  # both A.jpg and a.jpg
            name += "~"
        names[name.casefold()] = (name, path / file)
    return dict(names.values())


def run_id(cfg: DictConfig) -> str:
    """Return a hash of all settings that decide what a mask looks like, the weights included."""
    plain: Any = OmegaConf.to_container(cfg, resolve=True)
    settings = ["compare_with", "tile", "tta", "batch_size", "min_confidence"]
    settings += ["model"] if cfg.checkpoint is None else []
    values = [plain["trainer"]["precision"], *(plain[key] for key in settings)]
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode())
    model = plain["model"]
    for weights in (cfg.checkpoint, cfg.compare_with, model.get("weights"), model.get("name")):
        # Of published weights the name has to do.
        with suppress(InputError), checkpoint.locate(weights or "").open("rb") as file:
            while chunk := file.read(1 << 20):  # files may be gigabytes
                digest.update(chunk)
    return digest.hexdigest()[:16]


class OutputFolder:
    """The folder of a run's outputs, which no other run writes into meanwhile.

    Args:
        folder: Its path.
        source: The image, or the folder of the images.
        files: The images.
        outputs: What is saved of them, see `seg_torch.prediction.segmentation`; and `legend`.
        run: From `run_id`: what another run has left counts if it had the same.
        processes: Those of this run.

    Raises:
        InputError: On entering: it cannot be written, or another run does.
    """

    def __init__(
        self,
        folder: Path,
        source: Path,
        files: Files,
        outputs: Sequence[str],
        run: str,
        processes: Processes,
    ) -> None:
        self.folder, self.files = folder, files
        self.source = source if source.is_dir() else source.parent
        self.outputs = [output for output in outputs if output != "legend"]
        self.has_legend = "legend" in outputs
        self.run, self.processes = run, processes
        # Names that were never used: a process that does not find its own writes to another disk,
        # and what is left of a run whose first process died does not write into one of ours.
        start = processes.same(uuid.uuid4().hex)
        self.journals = [
            folder / JOURNAL / f"{rank}-{start}.jsonl" for rank in range(processes.count)
        ]

    def __enter__(self) -> OutputFolder:
        with ExitStack() as claim:  # given up again where this fails
            self.processes.first(lambda: self._claim(claim))
            self.claim = claim.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is KeyboardInterrupt:
            log.info("interrupted: the same command goes on with what is left")
        self.claim.close()

    def _claim(self, claim: ExitStack) -> None:
        """Claim the folder and delete what a killed run left half-written."""
        claim.enter_context(claimed(self.folder, "output"))
        try:
            (self.folder / JOURNAL).mkdir(exist_ok=True)
            for folder in (JOURNAL, *self.outputs):
                for leftover in (self.folder / folder).rglob(f"{PARTIAL}{'[0-9a-f]' * 32}*"):
                    leftover.unlink(missing_ok=True)
        except OSError as error:
            raise InputError(f"output={self.folder}: cannot be written: {error.strerror}") from None

    def left(self, batches: list[Batch], resume: bool) -> list[Batch]:
        """Return the batches that are still to be done, and begin new journals.

        A batch goes through the network as a whole again, so that its outputs stay what they were.

        Args:
            batches: All of the run.
            resume: Leave out what is complete.
        """
        complete = self._complete() if resume else {}
        batches = [batch for batch in batches if not complete.keys() >= set(batch)]
        for name in chain.from_iterable(batches):
            complete.pop(name, None)
        text = "".join(json.dumps(record) + "\n" for record in complete.values())
        write_text(self.folder / JOURNAL / "before.jsonl", text)
        for journal in (self.folder / JOURNAL).glob("[0-9]*.jsonl"):
            journal.unlink()
        for journal in self.journals:
            journal.touch()
        if complete:
            log.info("%d of %d images are complete already", len(complete), len(self.files))
        return batches

    def share(self, batches: list[Batch]) -> list[Batch]:
        """Return those of the batches that are this process's.

        Raises:
            InputError: The first process sees other files in the input or the output folder.
        """
        batches = batches[self.processes.rank :: self.processes.count]
        journal = self.journals[self.processes.rank]
        missing = [name for name in chain.from_iterable(batches) if name not in self.files]
        if missing or not journal.exists():
            folder, name = ("input", missing[0]) if missing else ("output", journal)
            raise InputError(
                f"{folder}: {name} is there for the first process, but not on "
                f"{socket.gethostname()}; input and output must lie on a disk that all machines "
                "share"
            )
        self.processes.wait()  # if one of them does not share the disk, the others end as well
        return batches

    def note(self, record: Record) -> None:
        """Write down that an image is complete or has failed."""
        # A line that a killed run left half-written must not swallow this one.
        with self.journals[self.processes.rank].open("a", encoding="utf-8") as file:
            file.write("\n" + json.dumps({"run": self.run, **record}) + "\n")

    def finish(self, labels: Labels) -> int:
        """Write what covers all images, name those that failed, and return their number."""
        records = {record["name"]: record for record in read_journals(self.folder)}
        done = {
            path.relative_to(self.source).as_posix(): records[name]
            for name, path in self.files.items()
            if "error" not in records[name]
        }
        failures = [records[name]["error"] for name in self.files if "error" in records[name]]
        self._write("predictions.csv", partial(_write_table, done, labels))
        if self.has_legend:
            self._write("legend.png", legend(labels).save)
        if "dataset" in self.outputs:
            write_classes(labels, self.folder / "dataset")
        if "coco" in self.outputs:
            images = self._annotations(done)
            self._write("coco.json", partial(write_coco, images=images, labels=labels))
        log.info("%d of %d images segmented: %s", len(done), len(self.files), self.folder)
        for failure in failures:
            log.error("failed: %s", failure)
        return len(failures)

    def _complete(self) -> dict[str, Record]:
        """Return the records of images that need not be done again, by name.

        Their outputs are there and were made with the same settings from the same file.
        """
        return {
            record["name"]: record
            for record in read_journals(self.folder)
            if record["run"] == self.run
            and "error" not in record
            and record["name"] in self.files
            and record["file"] == stamp(self.files[record["name"]])
            and all(output_path(self.folder, o, record["name"]).exists() for o in self.outputs)
        }

    def _annotations(self, records: Mapping[str, Record]) -> Iterator[tuple[str, int, int, Any]]:
        """Yield what `write_coco` takes, one image after the other, from the files of each."""
        for name, record in records.items():
            path = output_path(self.folder, "coco", record["name"])
            annotations = json.loads(path.read_bytes())["annotations"]
            yield name, record["width"], record["height"], annotations

    def _write(self, name: str, write: Callable[[str], object]) -> None:
        """Write a file of the folder.

        It is first written among the journals: what a killed run leaves of it does not lie in a
        folder that may hold files of others.
        """
        draft = self.folder / JOURNAL / name
        write(str(draft))
        os.replace(draft, self.folder / name)


def read_journals(folder: Path) -> Iterator[Record]:
    """Yield the records of an output folder, in the order of its journals' names."""
    for journal in sorted((folder / JOURNAL).glob("*.jsonl")):
        for line in journal.read_text(encoding="utf-8").splitlines():
            with suppress(json.JSONDecodeError):  # empty, or a half-written one
                yield json.loads(line)


def stamp(path: Path) -> list[int]:
    """Return the size of a file and when it was changed, to tell whether it is still the same."""
    return [path.stat().st_size, path.stat().st_mtime_ns]


def _write_table(records: Mapping[str, Record], labels: Labels, path: str) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["file", "width", "height", "mean_confidence", "seconds", *labels.names])
        for name, record in records.items():
            row = [name, record["width"], record["height"], f"{record['confidence']:.6f}"]
            shares = [f"{share:.6f}" for share in record["areas"]]
            writer.writerow([*row, f"{record['seconds']:.3f}", *shares])
