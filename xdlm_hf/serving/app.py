"""The application of `xdlm-serve`: its routes, and the replies in OpenAI's form."""

import asyncio
import contextlib
import functools
import hmac
import ipaddress
import json
import time
import uuid
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect

from ..generation.protocol import length_limit
from ..watch.tokens import TokenPieces
from .drafts import Draft, draft_body
from .engine import Done, Engine, Job, Piece
from .fields import RequestError
from .playground import HEADERS, playground
from .prompts import TokenFloor
from .requests import Defaults, GenerationRequest, Limits, parse
from .revisions import parse_revision

DISCARDED = 16  # times `max_body` is read, and discarded, of a longer body: while it sends, a client reads no reply
LONG_BODY = 1 << 16  # bytes; larger bodies are tokenized in a thread of their own and do not delay smaller ones
CLIENT_GONE = 499  # nginx's status for a connection that the client closed; only the metrics show it


@dataclass(frozen=True)
class ServerSettings:
    """Settings of the server; sizes in bytes, times in seconds.

    Attributes:
        cors: Origins whose web pages may use the server, "*" for all.
        local_only: Whether the server is for this machine. Without a key it then answers only under `localhost` or an
            address: a web page that lets its own name point to this machine (DNS rebinding) is of the server's origin.
        header_timeout: For the head of a request, from the connection or the end of the previous request.
        drain_timeout: For requests in progress at shutdown.
        keep_alive: Between comments that keep a stream without text open.
    """

    name: str
    limits: Limits = field(default_factory=Limits)
    defaults: Defaults = field(default_factory=Defaults)
    api_key: str | None = None
    cors: tuple[str, ...] = ()
    local_only: bool = False
    max_body: int = 1 << 20
    header_timeout: float = 10
    body_timeout: float = 30
    drain_timeout: float = 30
    keep_alive: float = 10


def create_app(engine: Engine, settings: ServerSettings) -> FastAPI:
    """The application; its lifespan starts and stops the engine."""

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
    app.add_exception_handler(ClientDisconnect, service.client_gone)
    app.add_exception_handler(Exception, service.refuse_unexpected)
    if settings.cors:
        # Every header may be sent: OpenAI's client adds some of its own. Credentials (cookies) are not used.
        app.add_middleware(
            CORSMiddleware, allow_origins=settings.cors, allow_methods=["GET", "POST"], allow_headers=["*"]
        )
    for path, handler, methods in (
        ("/", service.playground, ["GET"]),
        ("/v1/completions", service.completions, ["POST"]),
        ("/v1/chat/completions", service.chat_completions, ["POST"]),
        ("/v1/revise", service.revise, ["POST"]),
        ("/v1/models", service.models, ["GET"]),
        ("/v1/models/{name:path}", service.model, ["GET"]),
        ("/health", service.health, ["GET"]),
        ("/metrics", service.metrics, ["GET"]),
    ):
        app.add_api_route(path, handler, methods=methods, response_model=None)
    return app


def _is_local_name(host: str) -> bool:
    """Whether a host is `localhost` or an address, which no name server answers for."""
    with contextlib.suppress(ValueError):
        ipaddress.ip_address(host)
        return True
    return host == "localhost"


class _Service:
    """The handlers of the routes."""

    def __init__(self, engine: Engine, settings: ServerSettings):
        self.engine, self.settings, self.created = engine, settings, int(time.time())
        self.floor = TokenFloor.of(engine.tokenizer)
        self.pieces = TokenPieces(engine.tokenizer, engine.model.config.mask_token_id)
        engine.tokenizer("")  # a first call sets state, e.g. no truncation, which two threads must not do at once
        # Requests are parsed outside the event loop, large bodies in a thread of their own.
        self.small, self.large = (ThreadPoolExecutor(1, f"xdlm-parse-{size}") for size in ("small", "large"))

    def close(self) -> None:
        for executor in (self.small, self.large):
            executor.shutdown(wait=False, cancel_futures=True)

    async def playground(self, request: Request) -> Response:
        return self._counted(request, HTMLResponse(playground(), headers=HEADERS))

    async def completions(self, request: Request) -> Response:
        return await self._answer(request, functools.partial(parse, chat=False))

    async def chat_completions(self, request: Request) -> Response:
        return await self._answer(request, functools.partial(parse, chat=True))

    async def revise(self, request: Request) -> Response:
        return await self._answer(request, parse_revision)

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

    async def client_gone(self, request: Request, error: ClientDisconnect) -> Response:
        return self._counted(request, Response(status_code=CLIENT_GONE))

    async def refuse_unexpected(self, request: Request, error: Exception) -> Response:
        return await self.refuse(request, RequestError("internal error", 500, kind="server_error"))

    def _model(self) -> dict[str, Any]:
        return {
            "id": self.settings.name,
            "object": "model",
            "created": self.created,
            "owned_by": "xdlm_hf",
            "max_model_len": length_limit(self.engine.model.config),  # prompt and answer, as vLLM names it
        }

    def _counted(self, request: Request, response: Response) -> Response:
        route = request.scope.get("route")
        path = route.path if route is not None else "unknown"  # not the requested path: each would be a new label
        self.engine.metrics.requests.labels(path, response.status_code).inc()
        return response

    def _authorize(self, request: Request) -> None:
        key, host = self.settings.api_key, request.url.hostname or ""
        if key is None and self.settings.local_only and not _is_local_name(host):
            raise RequestError(
                f"the request names the host {host!r}; without an API key this server answers only under localhost or "
                "an address. Use one of them, or start it with --api_key.",
                403,
                code="host_not_allowed",
            )
        given = request.headers.get("authorization", "").encode()
        if key is not None and not hmac.compare_digest(given, f"Bearer {key}".encode()):
            raise RequestError(
                "a valid API key is needed: Authorization: Bearer KEY.",
                401,
                code="invalid_api_key",
                kind="authentication_error",
            )

    async def _answer(self, request: Request, parse_body: Callable[..., GenerationRequest]) -> Response:
        self._authorize(request)
        body = await self._body(request)
        executor = self.large if len(body) > LONG_BODY else self.small
        asked = await asyncio.get_running_loop().run_in_executor(executor, self._parse, body, parse_body)
        job = self.engine.submit(asked)
        reply = _Reply(asked, self.settings.name)
        if asked.stream:
            response = _EventStream(self._stream(job, reply), lambda: self.engine.cancel(job))
            return self._counted(request, response)
        return self._counted(request, await self._whole(request, job, reply))

    async def _body(self, request: Request) -> bytearray:
        """The body received.

        Raises:
            RequestError: If it is too large, too slow, or not declared as JSON.
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
        return received

    def _parse(self, received: bytearray, parse_body: Callable[..., GenerationRequest]) -> GenerationRequest:
        engine, settings = self.engine, self.settings
        try:
            # Decoded here because json.loads() accepts surrogates in UTF-8; invalid UTF-8 is a ValueError too.
            body = json.loads(received.decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            raise RequestError(f"the body is not JSON: {error}") from error
        return parse_body(
            body,
            model_name=settings.name,
            tokenizer=engine.tokenizer,
            config=engine.model.config,
            limits=settings.limits,
            defaults=settings.defaults,
            floor=self.floor,
        )

    async def _whole(self, request: Request, job: Job, reply: "_Reply") -> Response:
        """The complete reply; the job is cancelled if the client disconnects."""
        collecting = asyncio.create_task(_collect(job))
        watching = asyncio.create_task(_disconnected(request))
        try:
            await asyncio.wait({collecting, watching}, return_when=asyncio.FIRST_COMPLETED)
            if not collecting.done():
                return Response(status_code=CLIENT_GONE)
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
                event = await asyncio.wait_for(job.next_event(), self.settings.keep_alive)
            except TimeoutError:
                yield ": still generating\n\n"
                continue
            if isinstance(event, Piece):
                yield _sse(reply.piece(event))
                continue
            if isinstance(event, Draft):
                yield _sse(reply.draft(event, self.pieces))
                continue
            if isinstance(event, RequestError):
                yield _sse(event.body())
            elif reply.asked.include_usage:
                yield _sse(reply.usage_chunk(job))
            yield "data: [DONE]\n\n"
            return


class _EventStream(StreamingResponse):
    """A stream that calls `close` when it ends, for whatever reason.

    The generator cannot do that itself: if the client disconnects before the first byte, it is never started.
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
        name, kind = "cmpl-", "text_completion"
        if asked.chat:
            name, kind = "chatcmpl-", "chat.completion.chunk" if asked.stream else "chat.completion"
        elif asked.settings.task == "revision":
            name, kind = "revise-", "text_revision"
        self.common = {
            "id": name + uuid.uuid4().hex,
            "object": kind,
            "created": int(time.time()),
            "model": model,
        }

    def opening(self) -> list[dict[str, Any]]:
        if not self.asked.chat:
            return []
        return [self._chunk(i, {"delta": {"role": "assistant", "content": ""}}, None) for i in range(self.asked.rows)]

    def piece(self, piece: Piece) -> dict[str, Any]:
        return self._chunk(piece.index, self._new_text(piece.text), piece.finish_reason)

    def draft(self, draft: Draft, pieces: TokenPieces) -> dict[str, Any]:
        """A chunk that adds no text, so that clients which know no drafts need not skip it."""
        body = draft_body(draft, self.asked.settings.total_steps, pieces)
        return self._chunk(draft.index, {**self._new_text(""), "draft": body}, None)

    def _new_text(self, text: str) -> dict[str, Any]:
        if self.asked.chat:
            return {"delta": {"content": text} if text else {}}
        return {"text": text}

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
    while not isinstance(event := await job.next_event(), Done):
        if isinstance(event, RequestError):
            raise event


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _sse(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"
