"""A port for a test."""

import socket


def free_port() -> int:
    """Return one that nobody listens on."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]
