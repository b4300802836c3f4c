"""`xdlm-serve`: an HTTP server for a checkpoint, with the part of OpenAI's API that applies to it.

    xdlm-serve --model PATH [--port 8000] [--api_key KEY]

/v1/completions, /v1/chat/completions and /v1/models, with server-sent events for `stream`; also /health and
/metrics. `transformers serve` cannot run these models (docs/serving.md). Needs the extra `serve`.
"""

import argparse
import asyncio
import contextlib
import functools
import ipaddress
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ..loading import DTYPES, add_version_option, load
from .requests import Defaults, Limits

try:
    import uvicorn
    from uvicorn.protocols.http.auto import AutoHTTPProtocol

    from .app import ServerSettings, create_app
    from .engine import Engine
except ModuleNotFoundError as error:
    raise SystemExit(f"xdlm-serve: {error}; install the extra: pip install 'xdlm_hf[serve]'") from error
logger = logging.getLogger(__name__)
LOOPBACK = ("127.0.0.1", "::1", "localhost")


class TimedProtocol(AutoHTTPProtocol):
    """Uvicorn's HTTP protocol with a timeout for the head of a request, after which it closes the connection.

    Uvicorn's own timer, `timeout_keep_alive`, starts after a response and stops at the next byte.

    Args:
        header_timeout: Seconds.
    """

    def __init__(self, *args: Any, header_timeout: float, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._header_timeout = header_timeout
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._set_timer()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._set_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._stop_timer()

    @property
    def _answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _set_timer(self) -> None:
        """Start the timer while no request is being answered, stop it otherwise."""
        if self._answering:
            self._stop_timer()
        elif self._timer is None:
            self._timer = self.loop.call_later(self._header_timeout, self._hang_up)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _hang_up(self) -> None:
        if not self._answering:
            self.transport.close()


class Server(uvicorn.Server):
    """Uvicorn with a graceful shutdown: it accepts no more connections, and requests in progress finish.

    After `drain_timeout` the requests that still run or wait get an error instead of a closed connection.
    """

    def __init__(self, engine: Engine, settings: ServerSettings, **options: Any):
        protocol = functools.partial(TimedProtocol, header_timeout=settings.header_timeout)
        hang_up = settings.drain_timeout + 10  # closes connections of clients that do not read the error
        app = create_app(engine, settings)
        super().__init__(uvicorn.Config(app, http=protocol, timeout_graceful_shutdown=hang_up, **options))
        self.engine, self.drain_timeout = engine, settings.drain_timeout

    async def shutdown(self, *args: Any, **kwargs: Any) -> None:
        ending = asyncio.create_task(self._end_engine())
        try:
            await super().shutdown(*args, **kwargs)
        finally:
            ending.cancel()

    async def _end_engine(self) -> None:
        await asyncio.sleep(self.drain_timeout)
        await asyncio.to_thread(self.engine.stop)


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("xdlm-serve", description=__doc__.split("\n")[0])
    add_version_option(parser)
    add: Callable[..., Any] = parser.add_argument
    add("--model", required=True, help="folder or Hub name of a checkpoint")
    add("--served_name", help="its name in the API; by default the last part of --model")
    add("--dtype", default="auto", choices=DTYPES)
    add("--device", default="auto", help="auto, cpu, cuda:0, ...")
    add("--host", default="127.0.0.1", help="address to listen on; any but loopback is open to other machines")
    add("--port", type=int, default=8000)
    add("--api_key", default=os.environ.get("XDLM_API_KEY"), help="key that clients must send; or XDLM_API_KEY")
    add("--cors", nargs="+", default=[], metavar="ORIGIN", help="origins whose web pages may use the server")
    add("--drain_timeout", type=float, default=30, help="seconds that running requests have at SIGTERM and Ctrl-C")
    add("--max_batch_size", type=int, default=8, help="answers generated together")
    add("--max_queue", type=int, default=64, help="requests that may wait; beyond that, 429")
    add("--max_new_tokens", type=int, default=1024, help="longest answer a request may ask for")
    add("--max_prompt_tokens", type=int, help="longest prompt; by default what the model's length leaves")
    add("--max_tokens", type=int, default=128, help="length of an answer where the request names none")
    add(
        "--block_length",
        type=int,
        help="default block_length; at k = 0 streams are sent by block",
    )
    add("--tokens_per_step", type=int, default=1, help="steps = length / this where the request names no steps")
    return parser


def _check(options: argparse.Namespace) -> None:
    """Refuse values out of range.

    Raises:
        ValueError: Naming the option.
    """
    positive = ("max_batch_size", "max_queue", "max_new_tokens", "max_prompt_tokens", "max_tokens", "block_length")
    for name in (*positive, "tokens_per_step"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name} {value} must be positive")
    if not 0 <= options.drain_timeout < float("inf"):
        raise ValueError(f"--drain_timeout {options.drain_timeout} must be 0 or more seconds")
    if not 0 <= options.port <= 65535:
        raise ValueError(f"--port {options.port} must be from 0 to 65535; 0 takes a free one")
    if options.api_key is not None and not options.api_key.isascii():
        raise ValueError("--api_key must be ASCII, as HTTP headers are")
    for origin in options.cors:
        if origin == "*" and not options.api_key:
            raise ValueError("--cors * lets every web page use this server; name the origins, or set --api_key")
        parts = urlsplit(origin)
        plain = f"{parts.scheme}://{parts.netloc}" == origin == origin.lower() and parts.netloc
        if origin != "*" and not (plain and parts.scheme in ("http", "https")):
            raise ValueError(f"--cors {origin} is no origin; browsers send e.g. http://localhost:3000, without a path")


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; made before the model is loaded, so that a busy port is known at once.

    Raises:
        ValueError: If the address is not available.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise ValueError(
            f"cannot listen on --host {host} --port {port}: {error.strerror}; choose another port or host"
        ) from error


def main(argv: list[str] | None = None) -> None:
    """Load the model and serve until interrupted."""
    parser = arguments()
    options = parser.parse_args(argv)
    try:
        _check(options)
    except ValueError as error:
        parser.error(str(error))
    logging.basicConfig(level=logging.INFO)
    if options.host not in LOOPBACK and not options.api_key:
        logger.warning(f"listening on {options.host} without an API key: anyone who can reach this machine can use it.")
    with contextlib.ExitStack() as stack:
        try:
            listening = stack.enter_context(listen(options.host, options.port))
            model, tokenizer = load(options.model, options.dtype, options.device)
        except ValueError as error:
            raise SystemExit(f"xdlm-serve: {error}") from error
        _serve(model, tokenizer, options, listening)


def _serve(model: Any, tokenizer: Any, options: argparse.Namespace, listening: socket.socket) -> None:
    engine = Engine(model, tokenizer, options.max_batch_size, options.max_queue)
    host, port = listening.getsockname()[:2]
    settings = ServerSettings(
        name=options.served_name or Path(options.model).name,
        limits=Limits(options.max_new_tokens, options.max_prompt_tokens, options.max_batch_size),
        defaults=Defaults.of(
            model.generation_config, options.max_tokens, options.block_length, options.tokens_per_step
        ),
        api_key=options.api_key,
        cors=tuple(options.cors),
        local_only=ipaddress.ip_address(host).is_loopback,
        drain_timeout=options.drain_timeout,
    )
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    logger.info(f"serving {settings.name} on {url}/v1; playground: {url}/")
    # Uvicorn raises the signal again after its shutdown: exit with status 0.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with contextlib.suppress(KeyboardInterrupt):
        Server(engine, settings).run(sockets=[listening])


if __name__ == "__main__":
    main()
