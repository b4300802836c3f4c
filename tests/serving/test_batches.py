"""Requests that share a batch, clients that leave, and a server that ends."""

import asyncio
import itertools
import json
import socket
import threading

import pytest
from servers import NAME, PATIENCE, Server, held, openai, reference, wait_until

from xdlm_hf import XDLMGenerationConfig
from xdlm_hf.serving.app import ServerSettings
from xdlm_hf.serving.engine import Engine, Job
from xdlm_hf.serving.fields import RequestError
from xdlm_hf.serving.requests import Defaults, Limits, parse

# ---------------------------------------------------------------------------------------------------------------------
# Batches and disconnects


@pytest.mark.parametrize("seeds", [(None,) * 4, (1, 2, 3, 3)], ids=["without", "with"])
def test_requests_with_equal_settings_share_a_batch(server, client, model, tokenizer, seeds):
    """Those with seeds too: at temperature 0 nothing is drawn."""
    prompts = ["The", "The quick brown fox", "A lazy dog jumps over", "naïve"]
    texts = [reference(model, tokenizer, prompt)[1] for prompt in prompts]
    rows, batches = server.metric("xdlm_batch_rows_sum"), server.metric("xdlm_batch_rows_count")
    answers = {}

    def ask(name, prompt, length, seed=None):
        options = {"model": NAME, "prompt": prompt, "max_tokens": length, "temperature": 0}
        answers[name] = client.completions.create(**options, seed=seed).choices[0].text

    gathered = threading.Event()
    with held(model, gathered.is_set):
        threads = [threading.Thread(target=ask, args=("first", "The", 24))]  # holds the engine while others gather
        threads[0].start()
        wait_until(lambda: server.metric("xdlm_running_rows") == 1)
        for prompt, seed in zip(prompts, seeds, strict=True):
            threads += [threading.Thread(target=ask, args=(prompt, prompt, 16, seed))]
        threads += [threading.Thread(target=ask, args=("other", "The", 32))]
        for thread in threads[1:]:
            thread.start()
        wait_until(lambda: server.engine.queue_length == 5)
        gathered.set()
        for thread in threads:
            thread.join(PATIENCE)
    assert [answers[prompt] for prompt in prompts] == texts  # left padding changes nothing
    assert server.metric("xdlm_batch_rows_sum") - rows == 6
    assert server.metric("xdlm_batch_rows_count") - batches == 3


def test_what_goes_into_one_batch(model, tokenizer):
    """Oldest first, equal settings only, as many rows as fit, and requests with a seed alone."""
    engine = Engine(model, tokenizer, max_batch_rows=4)

    def job(rows=1, defaults=Defaults(), **change):  # noqa: B008
        body = {"model": NAME, "prompt": "The", "n": rows, "max_tokens": 8} | change
        return Job(parse(body, False, NAME, tokenizer, model.config, Limits(), defaults), [], None)

    def batch(*jobs):
        engine._waiting.clear()
        engine._waiting.extend(jobs)
        return [jobs.index(one) for one in engine._take()]

    assert batch(job(), job(temperature=1.0), job(), job(max_tokens=16), job()) == [0, 2, 4]
    assert batch(job(2), job(3), job(2), job()) == [0, 2]
    assert batch(job(6), job()) == [0]  # too large for any batch, so a batch of its own
    assert batch(job(), job(seed=1), job(seed=2), job(user="other"), job(stop="x")) == [0, 1, 2, 3]
    remask = {"refinement": "remask_cap", "remask_rate": 0.1, "mixing_ratio": 0.1}
    for draws in ({"temperature": 0.5}, {"sampler": "ancestral"}, remask):
        assert batch(job(seed=1, **draws), job(seed=1, **draws), job(**draws)) == [0]
        assert batch(job(**draws), job(seed=1, **draws), job(**draws)) == [0, 2]
    for stored in ({"temperature": 0.5}, {"remasking": "random"}, {"sampler": "ancestral"}):
        defaults = Defaults.of(XDLMGenerationConfig(**stored), 16, None, 1)
        assert batch(job(seed=1, defaults=defaults), job(seed=1, defaults=defaults)) == [0]


def test_what_fits_a_request_depends_on_what_the_checkpoint_stores(model, tokenizer, monkeypatch):
    def settings(stored, block_length=None, **change):
        stored = XDLMGenerationConfig(**stored)
        body = {"model": NAME, "prompt": "The", "max_tokens": 20} | change
        defaults = Defaults.of(stored, 16, block_length, 1)
        asked = parse(body, False, NAME, tokenizer, model.config, Limits(), defaults).settings
        monkeypatch.setattr(model, "generation_config", stored)
        model.generate(**asked.options())
        return asked

    assert settings({"block_length": 8}).max_new_tokens == 20
    assert settings({"sampler": "ancestral"}, 8, top_p=0.9).block_length is None
    assert settings({"sampler": "ancestral"}, 8, sampler="confidence").max_new_tokens == 20
    assert settings({"temperature": 0.7}, top_p=0.9).top_p == 0.9
    with pytest.raises(RequestError, match="top_p=0.9 filters a draw and needs a temperature above 0"):
        settings({"temperature": 0.7}, top_p=0.9, temperature=0)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_the_engine(server, client, model, stream):
    cancelled, steps = server.metric("xdlm_cancelled_total"), server.metric("xdlm_steps_total")
    body = json.dumps({"model": NAME, "prompt": "The", "max_tokens": 128, "stream": stream}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    with held(model, lambda: server.metric("xdlm_cancelled_total") - cancelled == 2):
        gone, waiting = (socket.create_connection(server.address) for _ in range(2))
        gone.sendall(head.encode() + b"\r\n\r\n" + body)
        wait_until(lambda: server.metric("xdlm_running_rows") == 1)
        waiting.sendall(head.encode() + b"\r\n\r\n" + body)
        wait_until(lambda: server.engine.queue_length == 1)
        waiting.close()
        wait_until(lambda: server.engine.queue_length == 0)  # leaves the queue at once
        gone.close()
        wait_until(lambda: server.metric("xdlm_running_rows") == 0)
    assert server.metric("xdlm_cancelled_total") - cancelled == 2
    assert server.metric("xdlm_steps_total") - steps == 1  # the one that was under way
    assert client.completions.create(model=NAME, prompt="The", max_tokens=8).choices


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_left_before_the_answer_began(server, model, stream):
    """Gone as soon as the body is read: the generator of a stream may then never start."""
    cancelled, steps = server.metric("xdlm_cancelled_total"), server.metric("xdlm_steps_total")
    body = json.dumps({"model": NAME, "prompt": "The", "max_tokens": 128, "stream": stream}).encode()
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive():
        return messages.pop() if messages else {"type": "http.disconnect"}

    async def send(message):
        await asyncio.sleep(0)  # as a real server's may, where the connection is slow

    scope = {"type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1"}
    scope |= {"method": "POST", "path": "/v1/completions", "raw_path": b"/v1/completions", "query_string": b""}
    scope |= {"headers": [(b"content-type", b"application/json")], "scheme": "http", "server": ("x", 80)}
    with held(model, lambda: server.metric("xdlm_cancelled_total") - cancelled == 1):
        asyncio.run(server.server.config.app(scope, receive, send))
        assert server.metric("xdlm_cancelled_total") - cancelled == 1
        wait_until(lambda: not server.engine.queue_length and server.metric("xdlm_running_rows") == 0)
    assert server.metric("xdlm_steps_total") - steps <= 1  # none, or the one that was under way


def test_shutdown_ends_what_runs_and_what_waits(model, tokenizer):
    """When the time for what is in progress is over."""
    server = Server(model, tokenizer, ServerSettings(NAME, drain_timeout=0), max_batch_rows=1)
    errors = []

    def ask():
        try:
            server.client().completions.create(model=NAME, prompt="The", max_tokens=200)
        except openai.InternalServerError as error:
            errors.append(error.message)

    threads = [threading.Thread(target=ask) for _ in range(2)]
    with held(model, lambda: not server.engine.alive):
        for thread in threads:
            thread.start()
        wait_until(lambda: server.engine.queue_length == 1 and server.metric("xdlm_running_rows") == 1)
        server.stop()
        for thread in threads:
            thread.join(PATIENCE)
    assert len(errors) == 2 and all("the server is shutting down" in error for error in errors)


def test_what_runs_and_what_waits_finishes_before_the_end(model, tokenizer):
    server = Server(model, tokenizer, ServerSettings(NAME, defaults=Defaults(block_length=8)), max_batch_rows=1)
    options = {"model": NAME, "prompt": "The", "max_tokens": 32}
    texts, ended, shutting_down, passes = {}, threading.Event(), threading.Event(), itertools.count()

    def after_the_first_block(*_):
        if next(passes) >= 8:
            assert shutting_down.wait(PATIENCE)

    def ask():
        texts["whole"] = server.client().completions.create(**options).choices[0].text
        assert not ended.is_set()

    handle = model.register_forward_pre_hook(after_the_first_block)
    try:
        stream = iter(server.client().completions.create(**options, stream=True))
        texts["stream"] = next(stream).choices[0].text
        waiting = threading.Thread(target=ask)
        waiting.start()
        wait_until(lambda: server.engine.queue_length == 1)
        server.server.should_exit = True
        wait_until(lambda: refuses(server.address))
        shutting_down.set()
        texts["stream"] += "".join(chunk.choices[0].text for chunk in stream)
        waiting.join(PATIENCE)
        server.stop()
        ended.set()
    finally:
        shutting_down.set()
        handle.remove()
    assert texts["stream"] == texts["whole"] == reference(model, tokenizer, "The", 32)[1]


def refuses(address):
    try:
        socket.create_connection(address, timeout=5).close()
    except ConnectionRefusedError:
        return True
    return False
