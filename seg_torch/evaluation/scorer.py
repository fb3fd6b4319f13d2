"""Scorer: all scores of a network on the images of a split, for Lightning's Trainer."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer

from seg_torch import hardware
from seg_torch.data.module import SegmentationDataModule
from seg_torch.data.sampling import EvaluationGroup
from seg_torch.evaluation.results import Results
from seg_torch.labels import Labels
from seg_torch.metrics import (
    AveragePrecision,
    BoundaryScores,
    Calibration,
    ConfusionMatrix,
    ImageScores,
    LabelQuality,
    ScoredBlock,
    report,
)
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
        self.confusion = ConfusionMatrix(len(labels))
        self.average_precision = AveragePrecision(len(labels)) if average_precision else None
        width = None if boundary is True else boundary
        self.boundary = BoundaryScores(len(labels), width) if boundary else None
        self.calibration = Calibration()
        self.image_scores: ImageScores | None = None
        self.label_quality: LabelQuality | None = None
        self.scores_labels = label_quality
        self.results: Results | None = None

    def configure_model(self) -> None:
        shard(self)

    def on_test_start(self) -> None:
        torch.backends.cudnn.benchmark = False  # the images have several sizes
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        num_images = len(data.dataset(data.test_split))
        self.image_scores = ImageScores(len(self.labels), num_images).to(self.device)
        if self.scores_labels:
            self.label_quality = LabelQuality(num_images).to(self.device)

    def test_step(self, groups: Sequence[EvaluationGroup], batch_index: int) -> None:
        asked_for = (self.label_quality, self.average_precision, self.boundary)
        always = (self.image_scores, self.calibration)
        metrics: Any = [metric for metric in (*always, *asked_for) if metric is not None]
        for images, masks, numbers in groups:
            predictions = torch.empty_like(masks)
            for index, rows, columns, logits in self.inference.blocks(images, masks.shape[-2:]):
                predictions[index, rows, columns] = decide(logits)[0]
                maps = predictions[index], masks[index]
                block = ScoredBlock(numbers[index], rows, columns, logits, *maps)
                self.confusion.update(block.prediction, block.target)
                for metric in metrics:
                    metric.update(block)

    def on_test_epoch_end(self) -> None:
        assert self.image_scores is not None
        others = {}
        if self.average_precision is not None:
            others["average_precision"] = self.average_precision.compute()
        if self.boundary is not None:
            others |= self.boundary.compute()
        scores = report(self.confusion.compute(), self.labels.names, others)
        scores |= self.calibration.compute()
        scores["precision"] = self.inference.precision
        images = self.image_scores.compute()
        if self.label_quality is not None:
            images["label_quality"] = self.label_quality.compute()
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        dataset = data.dataset(data.test_split)
        self.results = Results.of(scores, images, self.labels, dataset)
        for metric in (self.confusion, self.average_precision, self.boundary, self.calibration):
            if metric is not None:
                metric.reset()


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
    """
    data.test_split = split
    # In float32 without TensorFloat-32, which is 10 bits.
    exact = scorer.inference.precision == "32-true"
    with hardware.full_float32() if exact else nullcontext():
        trainer.test(scorer, datamodule=data, verbose=False)
    results = scorer.results
    assert results is not None
    if trainer.is_global_zero:
        results.print(split)
        results.write(folder, split)
        log.info("scores (%s): %s", scorer.inference.precision, folder / f"{split}_metrics.json")
    return results
