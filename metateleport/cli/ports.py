"""A port that is free, for what the command line serves."""

from __future__ import annotations

import contextlib
import socket

from metateleport.cli.common import UsageError

__all__ = ["free_port"]

_NEAR = 100


def free_port(host: str, wanted: int | None, usual: int) -> int:
    """A free port.

    Args:
        host: the address to serve at.
        wanted: the port that was asked for; None for none.
        usual: where to look first if none was asked for.

    Raises:
        UsageError: if the port that was asked for is taken, or the address is none of this machine.

    Example:
        >>> 40000 <= free_port("127.0.0.1", None, 40000) < 40100
        True
    """
    if wanted is not None and wanted > 65535:
        raise UsageError(f"a port is a number up to 65535, not {wanted}")
    for port in (wanted,) if wanted is not None else range(usual, usual + _NEAR):
        try:
            family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        except OSError as error:
            raise UsageError(f"{host} port {port} is no address to serve at ({error})") from error
        with contextlib.closing(socket.socket(family, socket.SOCK_STREAM)) as tried:
            tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                tried.bind((host, port))
            except OSError as error:
                if wanted is not None or isinstance(error, PermissionError):
                    raise UsageError(
                        f"port {port} at {host} cannot be used ({error.strerror}): give another --port, or leave it out"
                    ) from error
                continue
        return port
    raise UsageError(f"no port from {usual} to {usual + _NEAR - 1} is free at {host}: give one with --port")
