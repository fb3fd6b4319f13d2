"""That no metric waits for a GPU, which counts in another way than a CPU."""

import numpy as np
import pytest
import torch
from scored import (
    NUM_CLASSES,
    blocks_of,
    blocks_of_images,
    random_maps,
    random_probabilities,
    scikit_matrix,
    updated,
)
from sklearn.metrics import average_precision_score

from seg_torch.metrics import (
    AveragePrecision,
    BoundaryScores,
    Calibration,
    ConfusionMatrix,
    ImageScores,
    LabelQuality,
    blocks,
)


def test_d30_no_metric_waits_for_the_device():
    # Tensors on "meta" have no values, so asking for one fails, as it would synchronise on CUDA.
    target = torch.zeros(2, 8, 8, dtype=torch.uint8, device="meta")
    confusion = ConfusionMatrix(NUM_CLASSES).to("meta")
    confusion.update(target.long(), target)
    assert confusion.compute().shape == (NUM_CLASSES, NUM_CLASSES)
    logits = torch.zeros(NUM_CLASSES, 8, 8, device="meta")
    for metric in (
        AveragePrecision(NUM_CLASSES),
        ImageScores(NUM_CLASSES, 2),
        Calibration(),
        BoundaryScores(NUM_CLASSES),
        LabelQuality(2),
    ):
        updated(metric.to("meta"), blocks_of(target[1], logits=logits, image=1))
        assert all(value.device.type == "meta" for value in metric.metric_state.values())


@pytest.mark.promise(25)
@pytest.mark.parametrize("deterministic", [False, True])
def test_d30_counts_of_the_way_that_gpus_take_are_exact(monkeypatch, deterministic):
    monkeypatch.setattr(blocks, "BINCOUNT_DEVICES", ())
    monkeypatch.setattr(torch, "bincount", None)
    torch.use_deterministic_algorithms(deterministic)
    try:
        for num_classes in (2, NUM_CLASSES, 200):
            prediction, target = random_maps(num_classes)
            metric = ConfusionMatrix(num_classes)
            metric.update(prediction, target)
            matrix = metric.compute()
            assert matrix.dtype == torch.int64
            np.testing.assert_array_equal(matrix, scikit_matrix(prediction, target, num_classes))
        probabilities, target = random_probabilities()
        metric = updated(AveragePrecision(NUM_CLASSES), blocks_of_images(probabilities, target))
    finally:
        torch.use_deterministic_algorithms(False)
    valid = target != 255
    columns = [probabilities[:, c][valid].numpy() for c in range(NUM_CLASSES)]
    expected = [average_precision_score(target[valid] == c, s) for c, s in enumerate(columns)]
    np.testing.assert_allclose(metric.compute(), expected, atol=2e-3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("deterministic", [False, True])
def test_d30_cuda_counts_like_the_cpu_and_never_synchronises(deterministic):
    prediction, target = random_maps()
    probabilities, _ = random_probabilities()

    def counted(device):
        confusion = ConfusionMatrix(NUM_CLASSES).to(device)
        others = [
            metric.to(device)
            for metric in (
                AveragePrecision(NUM_CLASSES),
                BoundaryScores(NUM_CLASSES),
                ImageScores(NUM_CLASSES, 2),
                Calibration(),
            )
        ]
        maps = [tensor.to(device) for tensor in (prediction, target)]
        parts = [*blocks_of(maps[1][0], logits=probabilities[0].log().to(device), image=1)]
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("error")
        try:
            confusion.update(*maps)
            for metric in others:
                updated(metric, parts)
        finally:
            if device == "cuda":
                torch.cuda.set_sync_debug_mode("default")
        return [confusion, *others]

    torch.use_deterministic_algorithms(deterministic)
    try:
        on_cuda = counted("cuda")
    finally:
        torch.use_deterministic_algorithms(False)
    confusion, precision, boundary, *_ = counted("cpu")
    for metric, other in zip((confusion, boundary), (on_cuda[0], on_cuda[2]), strict=True):
        for name, value in metric.metric_state.items():
            assert torch.equal(getattr(other, name).cpu(), value), name
    np.testing.assert_allclose(on_cuda[1].compute(), precision.compute(), atol=2e-3)
    rows = on_cuda[4].compute()["reliability"]
    assert sum(row["pixels"] for row in rows) == (target[0] != 255).sum()
    assert on_cuda[3].compute()["label_pixels"].sum(1).tolist() == [0, (target[0] != 255).sum()]
