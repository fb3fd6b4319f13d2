"""seg-torch serve: answer images that are sent over HTTP with their segmentation."""

import logging

from omegaconf import DictConfig

from seg_torch.errors import InputError
from seg_torch.serving import server

log = logging.getLogger(__name__)


def serve(cfg: DictConfig) -> None:
    """Serve `cfg.checkpoint` until it is interrupted.

    Raises:
        InputError: A setting or the model cannot be used, or the port is taken.
    """
    if not 1024 <= cfg.port <= 65535:
        raise InputError(f"port={cfg.port}: expected 1024 to 65535")
    server.check_settings(cfg)
    with server.listen(cfg.host, cfg.port) as listening:
        server.run(cfg, listening, _tell)


def _tell(address: str) -> None:
    log.info("%s is the page, %s/predict takes images; Ctrl-C ends it", address, address)
