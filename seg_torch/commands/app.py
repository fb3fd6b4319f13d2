"""seg-torch app: the server of `seg-torch serve` for this machine, and its page in the browser."""

import logging
import os
import socket
import sys
import webbrowser
from contextlib import suppress

from omegaconf import DictConfig

from seg_torch.errors import InputError
from seg_torch.serving import server

log = logging.getLogger(__name__)


def app(cfg: DictConfig) -> None:
    """Serve the page until it is interrupted.

    Raises:
        InputError: A setting or the model cannot be used, or the port is taken.
    """
    server.check_settings(cfg)
    with _listen(cfg) as listening:
        server.run(cfg, listening, _open if cfg.browser else _tell)


def _listen(cfg: DictConfig) -> socket.socket:
    *ports, last = range(7860, 7960) if cfg.port is None else [cfg.port]
    for port in ports:
        with suppress(InputError):
            return server.listen(cfg.host, port)
    return server.listen(cfg.host, last)


def _tell(address: str) -> None:
    log.info("%s (Ctrl-C ends it)", address)


def _open(address: str) -> None:
    _tell(address)
    # Without a screen Python would open a browser for text in this terminal.
    screens = {"DISPLAY", "WAYLAND_DISPLAY"} & os.environ.keys()
    if screens or sys.platform in ("darwin", "win32"):
        webbrowser.open(address)
