"""`xdlm-serve`: a checkpoint behind the part of OpenAI's HTTP API that applies to it.

    xdlm-serve --model PATH [--port 8000] [--api_key KEY]

/v1/completions, /v1/chat/completions and /v1/models, with server-sent events for `stream`; /health and /metrics
beside. `transformers serve` cannot run these models (docs/serving.md). Needs the extra `serve`.
"""

import argparse
import asyncio
import contextlib
import hmac
import json
import logging
import os
import time
import uuid
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

try:
    import uvicorn
    from fastapi import FastAPI, Request, Response
    from fastapi.responses import JSONResponse, StreamingResponse
    from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect
except ModuleNotFoundError as error:
    raise SystemExit(f"xdlm-serve: {error}; install the extra: pip install 'xdlm_hf[serve]'") from error

from .loading import DTYPES, load
from .serving_engine import Done, Engine, Job, Piece
from .serving_requests import Defaults, GenerationRequest, Limits, RequestError, parse

logger = logging.getLogger(__name__)

LOOPBACK = ("127.0.0.1", "::1", "localhost")
DISCARDED = 16  # times `max_body` is read before hanging up: a client reads no answer while it still sends
GONE = 499  # nginx's status for a client that closed the connection; nobody reads it but the metrics


@dataclass(frozen=True)
class ServerSettings:
    """What the server allows; bytes, seconds."""

    name: str
    limits: Limits = field(default_factory=Limits)
    defaults: Defaults = field(default_factory=Defaults)
    api_key: str | None = None
    max_body: int = 1 << 20
    body_timeout: float = 30
    keep_alive: float = 10  # between comments on a stream that has no text yet


def create_app(engine: Engine, settings: ServerSettings) -> FastAPI:
    """The application; starts and stops the engine with itself."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        engine.start()
        yield
        await asyncio.to_thread(engine.stop)
        service.close()

    service = _Service(engine, settings)
    app = FastAPI(title="xdlm-serve", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.add_exception_handler(RequestError, service.refuse)
    app.add_exception_handler(HTTPException, service.refuse_http)
    app.add_exception_handler(ClientDisconnect, service.forget)
    app.add_exception_handler(Exception, service.refuse_unexpected)
    for path, handler, methods in (
        ("/v1/completions", service.completions, ["POST"]),
        ("/v1/chat/completions", service.chat_completions, ["POST"]),
        ("/v1/models", service.models, ["GET"]),
        ("/v1/models/{name:path}", service.model, ["GET"]),
        ("/health", service.health, ["GET"]),
        ("/metrics", service.metrics, ["GET"]),
    ):
        app.add_api_route(path, handler, methods=methods, response_model=None)
    return app


class Server(uvicorn.Server):
    """Uvicorn, which stops the engine first: requests that run or wait are told so, instead of being cut off."""

    def __init__(self, engine: Engine, settings: ServerSettings, **options: Any):
        super().__init__(uvicorn.Config(create_app(engine, settings), timeout_graceful_shutdown=5, **options))
        self.engine = engine

    async def shutdown(self, *args: Any, **kwargs: Any) -> None:
        await asyncio.to_thread(self.engine.stop)
        await super().shutdown(*args, **kwargs)


class _Service:
    """The handlers of the routes."""

    def __init__(self, engine: Engine, settings: ServerSettings):
        self.engine, self.settings, self.created = engine, settings, int(time.time())
        # One thread: tokenizing a long prompt must not hold up the event loop, nor two tokenize at once.
        self.tokenizing = ThreadPoolExecutor(1, "xdlm-tokenize")

    def close(self) -> None:
        self.tokenizing.shutdown(wait=False, cancel_futures=True)

    async def completions(self, request: Request) -> Response:
        return await self._answer(request, chat=False)

    async def chat_completions(self, request: Request) -> Response:
        return await self._answer(request, chat=True)

    async def models(self, request: Request) -> Response:
        self._authorize(request)
        return self._counted(request, JSONResponse({"object": "list", "data": [self._model()]}))

    async def model(self, request: Request, name: str) -> Response:
        self._authorize(request)
        if name != self.settings.name:
            raise RequestError(f"model {name!r} is not served here.", 404, "model", "model_not_found")
        return self._counted(request, JSONResponse(self._model()))

    async def health(self, request: Request) -> Response:
        alive = self.engine.alive
        body = {"status": "ok" if alive else "stopped", "waiting": self.engine.queue_length}
        return JSONResponse(body, 200 if alive else 503)

    async def metrics(self, request: Request) -> Response:
        self._authorize(request)
        return Response(generate_latest(self.engine.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    async def refuse(self, request: Request, error: RequestError) -> Response:
        headers = {"Retry-After": "1"} if error.status in (429, 503) else None
        return self._counted(request, JSONResponse(error.body(), error.status, headers))

    async def refuse_http(self, request: Request, error: HTTPException) -> Response:
        return await self.refuse(request, RequestError(f"{error.detail}: {request.url.path}", error.status_code))

    async def forget(self, request: Request, error: ClientDisconnect) -> Response:
        return self._counted(request, Response(status_code=GONE))

    async def refuse_unexpected(self, request: Request, error: Exception) -> Response:
        return await self.refuse(request, RequestError("internal error", 500, kind="server_error"))

    def _model(self) -> dict[str, Any]:
        return {"id": self.settings.name, "object": "model", "created": self.created, "owned_by": "xdlm_hf"}

    def _counted(self, request: Request, response: Response) -> Response:
        route = request.scope.get("route")
        path = route.path if route is not None else "unknown"  # not the path asked for: that may be anything
        self.engine.metrics.requests.labels(path, response.status_code).inc()
        return response

    def _authorize(self, request: Request) -> None:
        key = self.settings.api_key
        given = request.headers.get("authorization", "").encode()
        if key is not None and not hmac.compare_digest(given, f"Bearer {key}".encode()):
            raise RequestError(
                "a valid API key is needed: Authorization: Bearer KEY.",
                401,
                code="invalid_api_key",
                kind="authentication_error",
            )

    async def _answer(self, request: Request, chat: bool) -> Response:
        self._authorize(request)
        body = await self._body(request)
        engine, settings = self.engine, self.settings
        arguments = (body, chat, settings.name, engine.tokenizer, engine.model.config, settings.limits)
        loop = asyncio.get_running_loop()
        asked = await loop.run_in_executor(self.tokenizing, parse, *arguments, settings.defaults)
        job = engine.submit(asked)
        reply = _Reply(asked, settings.name)
        if asked.stream:
            response = _EventStream(self._stream(job, reply), lambda: engine.cancel(job))
            return self._counted(request, response)
        return self._counted(request, await self._whole(request, job, reply))

    async def _body(self, request: Request) -> Any:
        """The JSON received.

        Raises:
            RequestError: If it is too large, too slow, not declared as JSON, or none.
        """
        if request.headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
            raise RequestError("the body must have Content-Type: application/json.", 415)
        received, size, limit = bytearray(), 0, self.settings.max_body
        try:
            async with asyncio.timeout(self.settings.body_timeout):
                async for chunk in request.stream():
                    size += len(chunk)
                    if size <= limit:
                        received += chunk
                    elif size > DISCARDED * limit:
                        break
        except TimeoutError as error:
            raise RequestError("the body did not arrive in time.", 408) from error
        if size > limit:
            raise RequestError(f"the body is larger than this server's {limit} bytes.", 413)
        try:
            return json.loads(received)
        except (ValueError, RecursionError) as error:  # invalid UTF-8 is a ValueError too
            raise RequestError(f"the body is not JSON: {error}") from error

    async def _whole(self, request: Request, job: Job, reply: "_Reply") -> Response:
        """The answers when all are there; the job is given up when the client goes away before."""
        collecting = asyncio.create_task(_collect(job))
        watching = asyncio.create_task(_disconnected(request))
        try:
            await asyncio.wait({collecting, watching}, return_when=asyncio.FIRST_COMPLETED)
            if not collecting.done():
                return Response(status_code=GONE)
            collecting.result()
            return JSONResponse(reply.whole(job))
        finally:
            self.engine.cancel(job)
            for task in (collecting, watching):
                task.cancel()
            await asyncio.gather(collecting, watching, return_exceptions=True)

    async def _stream(self, job: Job, reply: "_Reply") -> AsyncIterator[str]:
        """Server-sent events, until the job is over."""
        for chunk in reply.opening():
            yield _sse(chunk)
        while True:
            try:
                event = await asyncio.wait_for(job.events.get(), self.settings.keep_alive)
            except TimeoutError:
                yield ": still generating\n\n"
                continue
            if isinstance(event, Piece):
                yield _sse(reply.piece(event))
                continue
            if isinstance(event, RequestError):
                yield _sse(event.body())
            elif reply.asked.include_usage:
                yield _sse(reply.usage_chunk(job))
            yield "data: [DONE]\n\n"
            return


class _EventStream(StreamingResponse):
    """Calls `close` when it is over, however that comes about.

    The generator cannot do that itself: where the client is gone before the first byte, it is never started.
    """

    def __init__(self, events: AsyncIterator[str], close: Callable[[], None]):
        super().__init__(events, media_type="text/event-stream")
        self.close = close

    async def __call__(self, *args: Any) -> None:
        try:
            await super().__call__(*args)
        finally:
            self.close()


class _Reply:
    """OpenAI's objects around the answers of one request."""

    def __init__(self, asked: GenerationRequest, model: str):
        self.asked = asked
        kind = "chat.completion" if asked.chat else "text_completion"
        chunk = asked.chat and asked.stream
        self.common = {
            "id": ("chatcmpl-" if asked.chat else "cmpl-") + uuid.uuid4().hex,
            "object": kind + ".chunk" if chunk else kind,
            "created": int(time.time()),
            "model": model,
        }

    def opening(self) -> list[dict[str, Any]]:
        if not self.asked.chat:
            return []
        return [self._chunk(i, {"delta": {"role": "assistant", "content": ""}}, None) for i in range(self.asked.rows)]

    def piece(self, piece: Piece) -> dict[str, Any]:
        text = {"delta": {"content": piece.text} if piece.text else {}} if self.asked.chat else {"text": piece.text}
        return self._chunk(piece.index, text, piece.finish_reason)

    def usage_chunk(self, job: Job) -> dict[str, Any]:
        return self.common | {"choices": [], "usage": self._usage(job)}

    def whole(self, job: Job) -> dict[str, Any]:
        choices = []
        for index, answer in enumerate(job.answers):
            message = {"role": "assistant", "content": answer.text}
            text = {"message": message} if self.asked.chat else {"text": answer.text}
            choices.append(self._choice(index, text, answer.finish_reason))
        return self.common | {"choices": choices, "usage": self._usage(job)}

    def _chunk(self, index: int, text: dict[str, Any], finish_reason: str | None) -> dict[str, Any]:
        usage = {"usage": None} if self.asked.include_usage else {}
        return self.common | {"choices": [self._choice(index, text, finish_reason)]} | usage

    def _choice(self, index: int, text: dict[str, Any], finish_reason: str | None) -> dict[str, Any]:
        return {"index": index, **text, "logprobs": None, "finish_reason": finish_reason}

    def _usage(self, job: Job) -> dict[str, int]:
        prompt, completion = self.asked.prompt_tokens, job.completion_tokens
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


async def _collect(job: Job) -> None:
    while not isinstance(event := await job.events.get(), Done):
        if isinstance(event, RequestError):
            raise event


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _sse(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("xdlm-serve", description=__doc__.split("\n")[0])
    add: Callable[..., Any] = parser.add_argument
    add("--model", required=True, help="folder or Hub name of a checkpoint")
    add("--served_name", help="its name in the API; by default the last part of --model")
    add("--dtype", default="auto", choices=DTYPES)
    add("--device", default="auto", help="auto, cpu, cuda:0, ...")
    add("--host", default="127.0.0.1", help="address to listen on; others than loopback let other machines in")
    add("--port", type=int, default=8000)
    add("--api_key", default=os.environ.get("XDLM_API_KEY"), help="key that clients must send; or XDLM_API_KEY")
    add("--max_batch_size", type=int, default=8, help="answers generated together")
    add("--max_queue", type=int, default=64, help="requests that may wait; beyond that, 429")
    add("--max_new_tokens", type=int, default=1024, help="longest answer a request may ask for")
    add("--max_prompt_tokens", type=int, help="longest prompt; by default what the model's length leaves")
    add("--max_tokens", type=int, default=128, help="length of an answer where the request names none")
    add("--block_length", type=int, help="tokens filled together where the request names none; k = 0 streams by block")
    add("--tokens_per_step", type=int, default=1, help="steps = length / this where the request names no steps")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Load the model and serve until interrupted."""
    parser = arguments()
    options = parser.parse_args(argv)
    for name in ("max_batch_size", "max_queue", "max_new_tokens", "max_prompt_tokens", "max_tokens", "block_length"):
        value = getattr(options, name)
        if value is not None and value < 1:
            parser.error(f"--{name} {value} must be positive")
    if options.tokens_per_step < 1:
        parser.error(f"--tokens_per_step {options.tokens_per_step} must be positive")
    logging.basicConfig(level=logging.INFO)
    if options.host not in LOOPBACK and not options.api_key:
        logger.warning(f"listening on {options.host} without an API key: whoever reaches this machine can use it.")
    try:
        model, tokenizer = load(options.model, options.dtype, options.device)
    except ValueError as error:
        raise SystemExit(f"xdlm-serve: {error}") from error
    engine = Engine(model, tokenizer, options.max_batch_size, options.max_queue)
    settings = ServerSettings(
        name=options.served_name or Path(options.model).name,
        limits=Limits(options.max_new_tokens, options.max_prompt_tokens, options.max_batch_size),
        defaults=Defaults.of(
            model.generation_config, options.max_tokens, options.block_length, options.tokens_per_step
        ),
        api_key=options.api_key,
    )
    with contextlib.suppress(KeyboardInterrupt):  # Uvicorn raises it again once everything is closed
        Server(engine, settings, host=options.host, port=options.port).run()


if __name__ == "__main__":
    main()
