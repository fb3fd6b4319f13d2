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
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf

from seg_torch.checkpoints import checkpoint
from seg_torch.datasets.folder import write_classes
from seg_torch.distributed import Processes
from seg_torch.drawing.regions import write_coco
from seg_torch.drawing.visualize import legend
from seg_torch.errors import InputError
from seg_torch.files import PARTIAL, by_suffix, identity, list_files, write_text
from seg_torch.folders import claimed
from seg_torch.images.read import IMAGE_SUFFIXES
from seg_torch.labels import Labels
from seg_torch.prediction.segmentation import OUTPUTS, output_path

log = logging.getLogger(__name__)

# The folder below the output folder with the records of what is complete.
JOURNAL = ".journal"
# Files of a run as a whole: the table, and by the name of the output that they belong to.
TABLE = "predictions.csv"
OF_ALL = {"legend": "legend.png", "coco": "coco.json", "dataset": "dataset/classes.txt"}

# What a record holds, and what besides if its image was segmented.
NOTED = {"run", "name"}
MEASURED = {"file", "width", "height", "confidence", "areas", "seconds"}

Files = dict[str, Path]  # by name
Batch = list[str]  # the names of its files
Record = dict[str, Any]
T = TypeVar("T")


def find_images(path: Path, output: Path | None = None, endings: Sequence[str] = ()) -> Files:
    """Return the image files at or below a path, by the name of their outputs.

    What an earlier run has written below `output` is left out: its images are no inputs.

    The name is the path below the folder without its suffix, or with it where another file would
    get the same name. Names differ in more than upper and lower case, since many file systems do
    not tell `A.png` from `a.png`.

    Args:
        path: Of an image or a folder.
        output: Folder of the outputs, which may lie below `path`, or the other way round.
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
    found = list_files(path, suffixes)
    files = _without_outputs(path, found, output)
    if found and not files:
        raise InputError(f"input={path}: all {len(found)} images there are outputs of predict")
    if not files:
        others = by_suffix(list_files(path, ("",)))
        there = f", but {others}" if others else ""
        raise InputError(f"input={path}: no images below this folder{there}")
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


def _without_outputs(path: Path, files: list[str], output: Path | None) -> list[str]:
    """Return the files below a path that no run has written below its output folder."""
    if output is None or not (output / JOURNAL).is_dir():
        return files
    written = {TABLE, *OF_ALL.values(), *(o.place.split("/")[0] for o in OUTPUTS.values())}
    home, folders, kept = output.resolve(), dict[Path, Path](), []
    for file in files:
        folder = (path / file).parent
        place = folders.setdefault(folder, folder.resolve()) / Path(file).name
        if not place.is_relative_to(home) or place.relative_to(home).parts[0] not in written:
            kept.append(file)
    return kept


def tell_left_out(path: Path, files: Files, output: Path, endings: Sequence[str] = ()) -> None:
    """Log what lies below a folder beside its images, by suffix.

    Args:
        path: The folder.
        files: What `find_images` has found there.
        output: See there.
        endings: See there.
    """
    taken = {*files.values()}
    others = _without_outputs(path, list_files(path, ("",)), output)
    left = [f for f in others if path / f not in taken and not f.endswith(tuple(endings[1:]))]
    if left:
        what = by_suffix(left)
        log.warning("%s: left out, since they are no images that can be read: %s", path, what)


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
        outputs: What is saved of each, see `seg_torch.prediction.segmentation`.
        of_all: Names of the files that cover all of them.
        run: From `run_id`: what another run has left counts if it had the same.
        processes: Those of this run.

    Raises:
        InputError: On entering: it cannot be written, another run does, or what is no output of
            predict would be replaced.
    """

    def __init__(
        self,
        folder: Path,
        source: Path,
        files: Files,
        outputs: Sequence[str],
        of_all: Sequence[str],
        run: str,
        processes: Processes,
    ) -> None:
        self.folder, self.files = folder, files
        self.source = source if source.is_dir() else source.parent
        self.outputs, self.of_all = outputs, of_all
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
        if kind is KeyboardInterrupt and self.outputs:
            log.info("interrupted: the same command goes on with what is left")
        self.claim.close()

    def _claim(self, claim: ExitStack) -> None:
        """Claim the folder and delete what a killed run left half-written."""
        claim.enter_context(claimed(self.folder, "output"))
        self._check_places()
        try:
            (self.folder / JOURNAL).mkdir(exist_ok=True)
            for folder in (JOURNAL, *self.outputs):
                for leftover in (self.folder / folder).rglob(f"{PARTIAL}{'[0-9a-f]' * 32}*"):
                    leftover.unlink(missing_ok=True)
        except OSError as error:
            raise InputError(f"output={self.folder}: cannot be written: {error.strerror}") from None

    def _check_places(self) -> None:
        """Refuse to write over an input, and over what no run of predict has written.

        Raises:
            InputError: Names the first such file.
        """
        inputs = {identity(path) for path in self.files.values() if path.exists()}
        is_ours = (self.folder / JOURNAL).is_dir()
        places = [output_path(self.folder, o, name) for name in self.files for o in self.outputs]
        for place in (*places, *(self.folder / name for name in self.of_all)):
            if not os.path.exists(place):
                continue
            is_input = identity(place) in inputs
            if is_ours and not is_input:
                continue
            what = "an input" if is_input else "there already, and not from predict"
            raise InputError(
                f"output={self.folder}: {place} is {what}; it would be replaced: choose another "
                "folder"
            )

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
        self.write(TABLE, partial(_write_table, done, labels))
        if OF_ALL["legend"] in self.of_all:
            self.write(OF_ALL["legend"], legend(labels).save)
        if OF_ALL["dataset"] in self.of_all:
            write_classes(labels, self.folder / "dataset")
        if OF_ALL["coco"] in self.of_all:
            images = self._annotations(done)
            self.write(OF_ALL["coco"], partial(write_coco, images=images, labels=labels))
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
            and all(
                os.path.exists(output_path(self.folder, o, record["name"])) for o in self.outputs
            )
        }

    def _annotations(self, records: Mapping[str, Record]) -> Iterator[tuple[str, int, int, Any]]:
        """Yield what `write_coco` takes, one image after the other, from the files of each."""
        for name, record in records.items():
            path = output_path(self.folder, "coco", record["name"])
            try:
                annotations = json.loads(path.read_bytes())["annotations"]
            except (ValueError, KeyError, TypeError, OSError):
                raise InputError(
                    f"{path} is damaged or was deleted meanwhile: delete it and give the same "
                    "command again, which makes it anew"
                ) from None
            yield name, record["width"], record["height"], annotations

    def write(self, name: str, write: Callable[[str], T]) -> T:
        """Write a file of the folder by `write(path)`, and return what that returns.

        It is first written among the journals: what a killed run leaves of it does not lie in a
        folder that may hold files of others.
        """
        draft = self.folder / JOURNAL / name
        result = write(str(draft))
        os.replace(draft, self.folder / name)
        return result


def read_journals(folder: Path) -> Iterator[Record]:
    """Yield the records of an output folder, in the order of its journals' names.

    What is no record any more, since a run was killed or a disk is damaged, is left out: its image
    is done again.
    """
    for journal in sorted((folder / JOURNAL).glob("*.jsonl")):
        for line in journal.read_bytes().splitlines():
            with suppress(ValueError, AttributeError):
                record = json.loads(line)
                if record.keys() >= NOTED and ("error" in record or record.keys() >= MEASURED):
                    yield record


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
