"""Mutation tests: small wrong changes of the package, and which tests notice them.

By hand, from the root of a checkout, on Linux or macOS; it takes a quarter of an hour:

    python tests/support/mutants.py            # all
    python tests/support/mutants.py losses     # those whose file's path holds the word

Each change is made alone, in a copy of the files that git knows. It prints the tests that fail, and
"SURVIVES" where none does. The table of docs/reliability.md sums that up.
"""

import importlib
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple, NoReturn

import pytest

ROOT = Path(__file__).parents[2]
LIBRARIES = ("torch", "torchvision.transforms.v2", "lightning", "torchmetrics", "timm", "scipy")


class Mutant(NamedTuple):
    """A wrong change: a text that occurs once in a file, what takes its place, and the tests."""

    file: str
    old: str
    new: str
    tests: str  # arguments of pytest


LOSSES = "tests/losses/test_image_loss.py tests/losses/test_losses.py -k 'e03 or processes'"
MUTANTS = [
    # Losses
    Mutant(
        "losses/cross_entropy.py",
        "if self.weighted else valid.sum()",
        "if self.weighted else (valid | True).sum()",
        "tests/losses/test_cross_entropy.py",
    ),
    Mutant(
        "losses/cross_entropy.py",
        "wrong = -torch.expm1(-loss)",
        "wrong = torch.exp(-loss)",
        "tests/losses/test_cross_entropy.py",
    ),
    Mutant(
        "losses/cross_entropy.py",
        ".ceil().long() - 1",
        ".ceil().long()",
        "tests/losses/test_cross_entropy.py tests/losses/test_image_loss.py",
    ),
    Mutant(
        "losses/cross_entropy.py",
        'reduction="none",\n            label_smoothing=self.label_smoothing,',
        'reduction="none",',
        "tests/losses/test_cross_entropy.py tests/losses/test_image_loss.py",
    ),
    Mutant(
        "losses/cross_entropy.py",
        "typical = present_counts.mean() if",
        "typical = present_counts.sum() if",
        "tests/losses/test_cross_entropy.py",
    ),
    Mutant(
        "losses/dice.py",
        "return base.mean_over_present(1 - dice, labelled)",
        "return (1 - dice).mean()",
        "tests/losses/test_dice.py",
    ),
    Mutant(
        "losses/dice.py",
        "/ (predicted + labelled + self.smooth)",
        "/ (predicted + labelled + 2 * self.smooth)",
        "tests/losses/test_dice.py",
    ),
    Mutant(
        "losses/dice.py",
        "self.alpha * (predicted - true) + self.beta * (labelled - true)",
        "self.beta * (predicted - true) + self.alpha * (labelled - true)",
        "tests/losses/test_dice.py",
    ),
    Mutant(
        "losses/dice.py",
        "gradient.addcmul_(probabilities, mean, value=-1)",
        "gradient.addcmul_(probabilities, mean, value=1)",
        "tests/losses/test_losses.py -k finite_differences",
    ),
    Mutant(
        "losses/lovasz.py",
        "missed = wrong.cumsum(0)",
        "missed = wrong.cumsum(0) - wrong.long()",
        "tests/losses/test_lovasz.py tests/losses/test_image_loss.py",
    ),
    Mutant(
        "losses/boundary.py",
        "torch.where(is_class, 1 - to_another, distances)",
        "torch.where(is_class, -to_another, distances)",
        "tests/losses/test_boundary_loss.py",
    ),
    Mutant(
        "losses/base.py",
        "(totals - counts) / totals.clamp(min=1)",
        "counts / totals.clamp(min=1)",
        "tests/losses/test_cross_entropy.py",
    ),
    Mutant(
        "losses/base.py",
        "total + processes * (share - share.detach())",
        "total + (share - share.detach())",
        LOSSES,
    ),
    Mutant(
        "losses/upsampled.py",
        "gradient[chunk.sources] += torch.autograd.grad(sums[0], part)[0]",
        "gradient[chunk.sources] = torch.autograd.grad(sums[0], part)[0]",
        "tests/losses/test_upsampled.py",
    ),
    Mutant(
        "losses/images.py",
        "isinstance(loss, SegmentationLoss) and not loss.per_image",
        "isinstance(loss, SegmentationLoss)",
        LOSSES,
    ),
    Mutant("losses/images.py", "self.images + image.labelled", "self.images + 1", LOSSES),
    # Metrics
    Mutant(
        "metrics/counts.py",
        "correct / (labelled + predicted - correct)",
        "correct / (labelled + predicted)",
        "tests/metrics/test_confusion.py",
    ),
    Mutant(
        "metrics/counts.py",
        '"precision": correct / predicted',
        '"precision": correct / labelled',
        "tests/metrics/test_confusion.py",
    ),
    Mutant(
        "metrics/counts.py",
        "/ np.isfinite(values).sum(axis=-1)",
        "/ values.shape[-1]",
        "tests/metrics/test_counts.py tests/metrics/test_confusion.py",
    ),
    Mutant(
        "metrics/counts.py",
        "None if math.isnan(number) else number",
        "0.0 if math.isnan(number) else number",
        "tests/metrics/test_counts.py tests/metrics/test_confusion.py",
    ),
    Mutant(
        "metrics/confusion.py",
        "target.clamp(max=num_classes).to(dtype) * num_classes + prediction.to(dtype)",
        "target.clamp(max=num_classes - 1).to(dtype) * num_classes + prediction.to(dtype)",
        "tests/metrics/test_confusion.py",
    ),
    Mutant(
        "metrics/probabilities.py",
        "(probabilities[class_id] * SCORE_STEPS).round()",
        "(probabilities[class_id] * SCORE_STEPS).floor()",
        "tests/metrics/test_average_precision.py",
    ),
    Mutant(
        "metrics/probabilities.py",
        "bins.masked_fill_(block.target == IGNORE_INDEX, 2 * num_steps)",
        "bins.masked_fill_(block.target == IGNORE_INDEX - 1, 2 * num_steps)",
        "tests/metrics/test_calibration.py",
    ),
    Mutant(
        "metrics/images.py",
        "block.confidence.masked_fill(ignored, 0).sum()",
        "block.confidence.sum()",
        "tests/metrics/test_image_scores.py",
    ),
    Mutant(
        "metrics/images.py",
        "((1 - probability) / LABEL_TEMPERATURE).exp()",
        "(probability / LABEL_TEMPERATURE).exp()",
        "tests/metrics/test_label_quality.py",
    ),
    Mutant(
        "metrics/images.py",
        "self.blocks.cpu().numpy() > 0",
        "self.blocks.cpu().numpy() >= 0",
        "tests/evaluation/test_report.py -k e22",
    ),
    Mutant(
        "metrics/boundary.py",
        "torch.where(label_line > 0, f, math.nan)",
        "torch.where(label_line + predicted_line > 0, f, math.nan)",
        "tests/metrics/test_boundary_scores.py",
    ),
    Mutant(
        "metrics/boundary.py",
        "near_edge[reach : height - reach, reach : width - reach] = False",
        "near_edge[:] = False",
        "tests/metrics/test_boundary_scores.py",
    ),
    # Inference and models
    Mutant(
        "upsample.py",
        'mode="bilinear", align_corners=False)',
        'mode="bilinear", align_corners=True)',
        "tests/prediction/test_inference.py -k 'd09 or torchvisions'",
    ),
    Mutant(
        "upsample.py",
        "* (logits.shape[2] / height) - 0.5)",
        "* (logits.shape[2] / height))",
        "tests/losses/test_upsampled.py",
    ),
    Mutant(
        "prediction/tiles.py",
        "(torch.arange(overlap, device=device) + 0.5) / overlap",
        "torch.arange(overlap, device=device) / overlap",
        "tests/prediction/test_tiles.py",
    ),
    Mutant(
        "prediction/tiles.py",
        "read = min(start, max(0, (end - tile) // 32 * 32))",
        "read = start",
        "tests/prediction/test_tiles.py",
    ),
    Mutant(
        "prediction/inference.py",
        "mirrored.softmax(1).flip(-1)",
        "mirrored.softmax(1)",
        "tests/prediction/test_inference.py -k 'flip or scales'",
    ),
    Mutant(
        "prediction/inference.py",
        "max(1, round(side * scale))",
        "max(1, round(side / scale))",
        "tests/prediction/test_inference.py -k 'flip or scales'",
    ),
    Mutant(
        "prediction/inference.py",
        "masked_fill_(highest < min_confidence, IGNORE_INDEX)",
        "masked_fill_(highest > min_confidence, IGNORE_INDEX)",
        "tests/runs/test_self_training.py -k less_probable",
    ),
    Mutant(
        "prediction/inference.py",
        "highest.mul_(255).round_()",
        "highest.mul_(255)",
        "tests/runs/test_self_training.py -k less_probable",
    ),
    Mutant(
        "models/base.py",
        "upsample(logits, (rows * stride, columns * stride))[..., :height, :width]",
        "upsample(logits, (height, width))",
        "tests/models/test_models.py -k 'e17 and vit'",
    ),
    Mutant(
        "models/hrnet.py",
        "logits = logits[:, :-1]",
        "logits = logits[:, 1:]",
        "tests/models/test_hrnet.py",
    ),
    Mutant(
        "models/masks.py",
        "softmax(-1)[..., :-1]",
        "softmax(-1)[..., 1:]",
        "tests/models/test_masks.py",
    ),
    # Data
    Mutant(
        "data/sampling.py",
        "mine = list(range(rank, length, world))",
        "mine = list(range(rank, length - 1, world))",
        "tests/data/test_sampling.py",
    ),
    Mutant(
        "data/sampling.py",
        "np.random.default_rng([self.seed, epoch])",
        "np.random.default_rng([self.seed])",
        "tests/data/test_sampling.py",
    ),
    Mutant(
        "data/sampling.py",
        "np.random.SeedSequence([self.seed, epoch, index, copy])",
        "np.random.SeedSequence([self.seed, 0, index, copy])",
        "tests/data/test_sampling.py tests/data/test_module.py",
    ),
    Mutant(
        "data/sampling.py",
        "np.arange(len(values)) - np.searchsorted(ordered, ordered)",
        "np.arange(len(values)) * 0",
        "tests/data/test_sampling.py",
    ),
    Mutant(
        "data/sampling.py",
        "            if self.resize_labels:\n",
        "            if True:\n",
        "tests/data/test_module.py",
    ),
    Mutant(
        "data/transforms.py",
        'params["padding"], (IGNORE_INDEX,))',
        'params["padding"], (0,))',
        "tests/data/test_transforms.py",
    ),
    Mutant(
        "data/transforms.py",
        "int(share * (highest - lowest + 1))",
        "int(share * (highest - lowest))",
        "tests/data/test_transforms.py",
    ),
    Mutant(
        "data/rare.py",
        "of_class = 1 / np.sqrt(shares[classes])",
        "of_class = 1 / shares[classes]",
        "tests/data/test_rare.py",
    ),
    Mutant(
        "data/paste.py",
        "self.shares[below.long()] >= self.shares[kind]",
        "self.shares[below.long()] > -2",
        "tests/data/test_paste.py",
    ),
    # Training
    Mutant(
        "training/schedulers.py",
        "max(1 - step / total_steps, 0) ** power",
        "max(1 - step / total_steps, 0)",
        "tests/training/test_schedulers.py",
    ),
    Mutant(
        "training/schedulers.py",
        "(1 + math.cos(",
        "(1 - math.cos(",
        "tests/training/test_schedulers.py",
    ),
    Mutant(
        "training/optimizers.py",
        "(max(layers.values()) + 1 - layer)",
        "(max(layers.values()) - layer)",
        "tests/training/test_optimizers.py",
    ),
    Mutant(
        "training/optimizers.py",
        "(parameter.ndim > 1 and",
        "(parameter.ndim >= 1 and",
        "tests/training/test_optimizers.py",
    ),
    # Results and drawings
    Mutant(
        "evaluation/bootstrap.py",
        "np.nanpercentile(values, (2.5, 97.5), axis=0)",
        "np.nanpercentile(values, (5, 95), axis=0)",
        "tests/evaluation/test_bootstrap.py tests/evaluation/test_compare.py",
    ),
    Mutant(
        "evaluation/bootstrap.py",
        "2 * (int(rarer) + 1)",
        "(int(rarer) + 1)",
        "tests/evaluation/test_bootstrap.py tests/evaluation/test_compare.py",
    ),
    Mutant(
        "evaluation/results.py",
        '"" if np.isnan(v) else',
        '"0" if np.isnan(v) else',
        "tests/evaluation/test_scorer.py -k e65",
    ),
    Mutant(
        "evaluation/results.py",
        "table.add_row(Text(name),",
        "table.add_row(name,",
        "tests/drawing/test_fonts.py",
    ),
    Mutant(
        "drawing/page.py",
        'autoescape=select_autoescape(["html"])',
        "autoescape=False",
        "tests/drawing/test_pages.py",
    ),
    Mutant(
        "drawing/templates/report.html",
        '"absent" if value is none',
        '"0.0000" if value is none',
        "tests/evaluation/test_report.py -k e22",
    ),
    Mutant(
        "drawing/curves.py",
        "matrix.sum(axis=1, keepdims=True)",
        "matrix.sum(axis=0, keepdims=True)",
        "tests/drawing/test_curves.py",
    ),
    Mutant(
        "drawing/regions.py",
        "points += (left - 0.5, top - 0.5)",
        "points += (left, top)",
        "tests/drawing/test_polygons.py",
    ),
    Mutant(
        "labels.py",
        "return Labels(self.names) if grey else self",
        "return self",
        "tests/drawing/test_visualize.py",
    ),
]


def failing_tests(copy: Path, mutant: Mutant) -> list[str]:
    """Return the tests that notice a change, at most three of them.

    Args:
        copy: Of the checkout; it is put back as it was.
        mutant: The change.
    """
    path = copy / "seg_torch" / mutant.file
    before = path.read_text(encoding="utf-8")
    assert before.count(mutant.old) == 1, mutant
    path.write_text(before.replace(mutant.old, mutant.new), encoding="utf-8")
    output = copy / "output.txt"
    child = os.fork()
    if child == 0:
        run_pytest(copy, mutant.tests, output)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    path.write_text(before, encoding="utf-8")
    lines = output.read_text(encoding="utf-8", errors="replace").splitlines()
    failed = [line.split()[1] for line in lines if line.startswith(("FAILED ", "ERROR "))]
    if code not in (0, 1) or (code == 1 and not failed):
        failed.append(f"pytest ended with {code}: {lines[-1:]}")
    return failed


def run_pytest(copy: Path, tests: str, output: Path) -> NoReturn:
    """Run tests of the copy in this process, which has the libraries, and end it."""
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for number in (1, 2):
        os.dup2(file, number)
    os.chdir(copy)
    sys.path[0] = str(copy)
    options = "-q --tb=no --maxfail=3 -p no:cacheprovider"
    os._exit(pytest.main(shlex.split(f"{options} {tests}")))


def main(word: str = "") -> None:
    """Try the changes whose file's path holds a word, one at a time."""
    for name in LIBRARIES:  # once: the processes of the tests are forked from this one
        importlib.import_module(name)
    sys.dont_write_bytecode = True
    files = subprocess.check_output(["git", "ls-files"], cwd=ROOT, text=True).splitlines()
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for file in files:
            (copy / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / file, copy / file)
        chosen = [mutant for mutant in MUTANTS if word in mutant.file]
        survivors = 0
        for mutant in chosen:
            failed = failing_tests(copy, mutant)
            survivors += not failed
            print(f"{mutant.file}: {mutant.old.strip()} -> {mutant.new.strip()}")
            print("   ", ", ".join(failed) or "SURVIVES", flush=True)
        print(f"{len(chosen) - survivors} of {len(chosen)} are noticed")


if __name__ == "__main__":
    main(*sys.argv[1:])
