"""A server in a thread of its own, and what tests do to its model: slow it down, hold it, ask it without a server."""

import asyncio
import contextlib
import json
import socket
import threading
import time

import pytest

pytest.importorskip("fastapi", reason="serving needs the extra `serve`")
pytest.importorskip("prometheus_client", reason="serving needs the extra `serve`")
pytest.importorskip("uvicorn", reason="serving needs the extra `serve`")
openai = pytest.importorskip("openai", reason="the tests of the server use OpenAI's client")

from xdlm_hf.serving import server as serving  # noqa: E402
from xdlm_hf.serving.engine import Engine  # noqa: E402

NAME = "tiny"
PATIENCE = 120  # seconds before a test takes something for lost; no verdict depends on what happens sooner


class Server:
    """The application in a thread of its own, on a free port."""

    def __init__(self, model, tokenizer, settings, **engine_options):
        self.engine = Engine(model, tokenizer, **engine_options)
        listening = socket.create_server(("127.0.0.1", 0))
        self.address = listening.getsockname()
        self.url = f"http://127.0.0.1:{self.address[1]}"
        self.server = serving.Server(self.engine, settings, log_level="error")
        self.thread = threading.Thread(target=self._serve, args=(listening,), daemon=True)
        self.thread.start()
        wait_until(lambda: self.server.started)

    def _serve(self, listening):
        self.loop = asyncio.new_event_loop()
        self.loop.run_until_complete(self.server.serve([listening]))

    def stop(self):
        self.server.should_exit = True
        self.thread.join(PATIENCE)
        assert not self.thread.is_alive() and not self.engine.alive

    def client(self, **options):
        options = {"api_key": "none", "max_retries": 0, "timeout": PATIENCE} | options
        return openai.OpenAI(base_url=self.url + "/v1", **options)

    def tasks(self):
        async def count():
            return len(asyncio.all_tasks())

        return asyncio.run_coroutine_threadsafe(count(), self.loop).result(PATIENCE)

    def metric(self, name):
        return self.engine.metrics.registry.get_sample_value(name)

    def raw(self, body, path="/v1/completions", headers=()):
        """One request as bytes, for what the client would not send: status and JSON."""
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        lines = [f"POST {path} HTTP/1.1", "Host: x", "Connection: close", f"Content-Length: {len(body)}"]
        lines += list(headers) or ["Content-Type: application/json"]
        with socket.create_connection(self.address, timeout=PATIENCE) as connection:
            try:
                connection.sendall("\r\n".join(lines).encode() + b"\r\n\r\n" + body)
            except (BrokenPipeError, ConnectionResetError):
                pass  # refused before all was sent; the answer is there nevertheless
            received = b""
            while part := connection.recv(1 << 16):
                received += part
        head, _, content = received.partition(b"\r\n\r\n")
        return int(head.split()[1]), json.loads(content)


def wait_until(condition):
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def reference(model, tokenizer, prompt, length=16, **options):
    """What the model answers without a server: ids up to the end of text, and their text."""
    ids = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    settings = {"max_new_tokens": length, "steps": length, "block_length": 8} | options
    answer = model.generate(**ids, **settings)[0, ids["input_ids"].shape[1] :].tolist()
    ended = tokenizer.eos_token_id in answer
    answer = answer[: answer.index(tokenizer.eos_token_id)] if ended else answer
    return answer, tokenizer.decode(answer, skip_special_tokens=True), ended


def slow(model, seconds=0.01):
    """Makes every forward pass take a while, as a large model's does."""
    return model.register_forward_pre_hook(lambda *_: time.sleep(seconds))


@contextlib.contextmanager
def held(model, condition):
    """Within, no forward pass begins before `condition` holds, as if the one before it took that long."""
    handle = model.register_forward_pre_hook(lambda *_: wait_until(condition))
    try:
        yield
    finally:
        handle.remove()
