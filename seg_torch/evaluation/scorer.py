"""Scorer: all scores of a network on the images of a split, for Lightning's Trainer."""

import logging
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import LightningModule, Trainer

from seg_torch import hardware, metrics
from seg_torch.data.module import SegmentationDataModule
from seg_torch.data.sampling import EvaluationGroup
from seg_torch.errors import InputError
from seg_torch.evaluation.results import Results
from seg_torch.labels import Labels
from seg_torch.prediction.inference import Inference, decide
from seg_torch.training.trainer import shard

log = logging.getLogger(__name__)


class Scorer(LightningModule):
    """Scores a network, which it leaves as it is.

    Args:
        inference: How it goes from images to class ids.
        labels: Its classes.
        average_precision: Score it, too.
        boundary: Score boundaries, too; a width in pixels, or true for 2 % of the diagonal.
        label_quality: Score the labels of each image, too.

    Attributes:
        results: After `trainer.test`, in every process the same.
    """

    def __init__(
        self,
        inference: Inference,
        labels: Labels,
        average_precision: bool = False,
        boundary: bool | int = False,
        label_quality: bool = False,
    ) -> None:
        super().__init__()
        self.network = inference.network  # which the Trainer moves to its device
        self.inference = inference
        self.labels = labels
        self.average_precision = average_precision
        self.boundary = boundary
        self.label_quality = label_quality
        self.metrics: dict[str, Any] = {}
        self.results: Results | None = None

    def configure_model(self) -> None:
        shard(self)

    def on_test_start(self) -> None:
        torch.backends.cudnn.benchmark = False  # the images have several sizes
        classes, images = len(self.labels), len(self._dataset())
        self.confusion = metrics.ConfusionMatrix(classes).to(self.device)
        self.metrics = {
            "images": metrics.ImageScores(classes, images),
            "calibration": metrics.Calibration(),
        }
        if self.average_precision:
            self.metrics["average_precision"] = metrics.AveragePrecision(classes)
        if self.boundary:
            width = None if self.boundary is True else self.boundary
            self.metrics["boundary"] = metrics.BoundaryScores(classes, width)
        if self.label_quality:
            self.metrics["label_quality"] = metrics.LabelQuality(images)
        for metric in self.metrics.values():
            metric.to(self.device)

    def test_step(self, groups: Sequence[EvaluationGroup], batch_index: int) -> None:
        for images, masks, numbers in groups:
            predictions = torch.empty_like(masks)
            for index, rows, columns, logits in self.inference.blocks(images, masks.shape[-2:]):
                predictions[index, rows, columns] = decide(logits)[0]
                maps = predictions[index], masks[index]
                block = metrics.ScoredBlock(numbers[index], rows, columns, logits, *maps)
                self.confusion.update(block.prediction, block.target)
                for metric in self.metrics.values():
                    metric.update(block)

    def on_test_epoch_end(self) -> None:
        values = {name: metric.compute() for name, metric in self.metrics.items()}
        per_class = values.get("boundary", {})
        if "average_precision" in values:
            per_class = {"average_precision": values["average_precision"], **per_class}
        scores = metrics.report(self.confusion.compute(), self.labels.names, per_class)
        scores |= {**values["calibration"], "precision": self.inference.precision}
        self._log(scores)
        images = values["images"]
        if "label_quality" in values:
            images["label_quality"] = values["label_quality"]
        # With limit_test_batches not all are scored.
        indices = np.flatnonzero(images.pop("scored")).tolist()
        images = {name: array[indices] for name, array in images.items()}
        dataset = self._dataset()
        scores |= {"split": self._split(), "images": len(indices), "images_of_split": len(dataset)}
        names = [dataset.name(index, "name") for index in indices]
        self.results = Results(scores, images, names, indices, self.labels)

    def _log(self, scores: dict[str, Any]) -> None:
        """Give the scores of all classes together to loggers, and to what trainer.test returns."""
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        # Loggers have a curve val/mean_iou, to which that of the best epoch does not belong.
        group = data.test_split if self._split() == data.test_split else "best_val"
        for name in ("mean_iou", "pixel_accuracy", "mean_accuracy", "mean_dice"):
            if scores[name] is not None:
                self.log(f"{group}/{name}", scores[name])

    def _split(self) -> str:
        """Return what is scored: val, where it stands in for a test split that the data lack."""
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        with suppress(InputError):  # other data may have no val
            if data.test_split == "test" and data.test_is_val:
                return "val"
        return data.test_split

    def _dataset(self) -> Any:
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        return data.dataset(data.test_split)


def score(
    trainer: Trainer, scorer: Scorer, data: SegmentationDataModule, folder: Path, split: str
) -> Results:
    """Score a network, print the table and write the results.

    Args:
        trainer: Of the processes that share the work.
        scorer: With the network.
        data: With the images.
        folder: Where the results go.
        split: `train`, `val` or `test`.

    Returns:
        The results, in all processes the same.

    Raises:
        InputError: `trainer.limit_test_batches` is 0.
    """
    data.test_split = split
    # In float32 without TensorFloat-32, which is 10 bits.
    exact = scorer.inference.precision == "32-true"
    with hardware.full_float32() if exact else nullcontext():
        trainer.test(scorer, datamodule=data, verbose=False)
    results = scorer.results
    if results is None:
        raise InputError("trainer.limit_test_batches=0: nothing was scored; use 1 or more, or null")
    if trainer.is_global_zero:
        results.print(split)
        results.write(folder, split)
        log.info("scores (%s): %s", scorer.inference.precision, folder / f"{split}_metrics.json")
    return results
