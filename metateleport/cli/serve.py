"""`metateleport serve`: a checkpoint as a service."""

from __future__ import annotations

import argparse
import ipaddress
import os
from pathlib import Path
from typing import Any

from metateleport.cli.common import Parser, UsageError, positive, say
from metateleport.cli.ports import free_port

__all__ = ["add"]

_EXAMPLES = """\
examples:
  metateleport serve digits                              then: metateleport.connect("http://127.0.0.1:8000")
  metateleport serve models:/lora@champion --port 8080
  METATELEPORT_TOKEN=... metateleport serve digits --host 0.0.0.0

Beside the service's own routes (/v1/about, /v1/teleport, /v1/gauges, /v1/steps, /v1/once) there are those of MLflow's
scoring server: /invocations, /ping and /version. docs/service.md describes the requests.
"""


def add(commands: Any) -> None:
    """Adds the command to a parser's subcommands."""
    parser: Parser = commands.add_parser(
        "serve",
        help="serve a checkpoint: group elements, gauges and step factors for models elsewhere",
        description="Serves a checkpoint. Clients send small matrices of their symmetries, never weights, and get "
        "group elements, gauges, step factors and the state to come back with; the service keeps nothing.",
        epilog=_EXAMPLES,
    )
    parser.add_argument("checkpoint", metavar="NAME_OR_ALIAS", help="bare name, folder, runs:/... or models:/...")
    parser.add_argument("--port", type=positive, help="port to serve at (default: 8000, or a free one near it)")
    parser.add_argument("--host", default="127.0.0.1", help="address to serve at (default %(default)s)")
    parser.add_argument(
        "--token-file",
        type=Path,
        metavar="FILE",
        help="a file with the bearer token that clients need (default: that of METATELEPORT_TOKEN, if it is set)",
    )
    parser.add_argument(
        "--batching",
        action="store_true",
        help="answer requests that arrive together at once: equal to rounding, not bit for bit",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Runs the command until it is stopped."""
    from metateleport.tracking import require_mlflow

    require_mlflow()
    token = _token(arguments.token_file)
    if token is None and not _is_loopback(arguments.host):
        raise UsageError(
            f"at {arguments.host} others could ask: set METATELEPORT_TOKEN or --token-file, or serve at 127.0.0.1"
        )
    port = free_port(arguments.host, arguments.port, 8000)
    import torch

    from metateleport.checkpoint import load_checkpoint
    from metateleport.tracking.serving import app_of, run_app

    checkpoint = load_checkpoint(arguments.checkpoint)
    # Many small requests: threads inside one product only get in each other's way, and would change its rounding.
    torch.set_num_threads(1)
    app = app_of(checkpoint, token=token, batching=arguments.batching)
    where = f"http://{arguments.host}:{port}"
    say(f"{checkpoint.name} is served at {where}; use it with metateleport.connect({where!r}); Ctrl-C ends it")
    run_app(app, arguments.host, port)
    return 0


def _token(path: Path | None) -> str | None:
    if path is None:
        return os.environ.get("METATELEPORT_TOKEN") or None
    try:
        token = path.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--token-file {path} cannot be read ({error})") from error
    if not token:
        raise UsageError(f"--token-file {path} is empty")
    return token


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
