"""seg-torch report: how good a model is and where it fails, in one HTML file."""

import logging

from omegaconf import DictConfig

from seg_torch.evaluation.report_page import report_page
from seg_torch.evaluation.scorer import score
from seg_torch.evaluation.setup import open_for_scoring
from seg_torch.files import write_text
from seg_torch.hardware import restored_flags

log = logging.getLogger(__name__)


@restored_flags()
def report(cfg: DictConfig) -> None:
    """Score a checkpoint and write `report.html` beside the scores."""
    setup = open_for_scoring(cfg, label_quality=True)
    with setup.processes.claimed(setup.folder):
        results = score(setup.trainer, setup.scorer, setup.data, setup.folder, cfg.split)
        if setup.trainer.is_global_zero:
            path = setup.folder / "report.html"
            write_text(path, report_page(cfg, setup, results))
            log.info("%s", path)
