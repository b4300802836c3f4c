"""xdlm-serve over a real socket, with OpenAI's client: answers, connections, load with faults, the command."""

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request

import pytest
from models import model_of, save_checkpoint
from servers import NAME, PATIENCE, Server, held, openai, reference, slow, wait_until

from xdlm_hf.serving.app import ServerSettings
from xdlm_hf.serving.requests import Defaults, Limits
from xdlm_hf.serving.server import main

# ---------------------------------------------------------------------------------------------------------------------
# Answers


def test_completion_is_what_the_model_says(client, model, tokenizer):
    prompt = "The quick brown"
    ids, text, ended = reference(model, tokenizer, prompt)
    answer = client.completions.create(model=NAME, prompt=prompt, max_tokens=16)
    assert answer.choices[0].text == text
    assert answer.choices[0].finish_reason == ("stop" if ended else "length")
    assert answer.usage.prompt_tokens == len(tokenizer(prompt)["input_ids"])
    assert answer.usage.completion_tokens == len(ids) + ended
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_chat_uses_the_template(client, server, model, tokenizer):
    assert server.engine.turn_ends - server.engine.ends == {tokenizer.convert_tokens_to_ids("<|eot_id|>")}
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who jumps?"}]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    _, text, _ = reference(model, tokenizer, prompt)
    answer = client.chat.completions.create(model=NAME, messages=messages, max_completion_tokens=16)
    assert answer.choices[0].message.content == text and answer.choices[0].message.role == "assistant"
    parts = [{"role": "developer", "content": "Be brief."}]
    parts += [{"role": "user", "content": [{"type": "text", "text": "Who "}, {"type": "text", "text": "jumps?"}]}]
    assert client.chat.completions.create(model=NAME, messages=parts).choices[0].message.content == text


def test_response_format_gives_json_by_the_schema(client, server):
    schema = {"type": "object", "properties": {"b": {"enum": ["x", 1]}, "a": {"type": "boolean"}}, "required": ["a"]}
    format_ = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}
    common = dict(model=NAME, max_tokens=40, response_format=format_, extra_body={"mixing_ratio": 0.1, "steps": 8})
    messages = [{"role": "user", "content": "Who jumps?"}]
    answer = client.chat.completions.create(messages=messages, n=2, **common).choices[1]
    value = json.loads(answer.message.content)
    assert isinstance(value.pop("a"), bool) and value in ({}, {"b": "x"}, {"b": 1}) and answer.finish_reason == "stop"
    stream = client.chat.completions.create(messages=messages, stream=True, **common)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    assert text == answer.message.content
    request = {"model": NAME, "prompt": "The", "max_tokens": 40, "steps": 8}
    status, body = server.raw({**request, "response_format": {"type": "json_object"}})
    assert status == 200, body
    assert isinstance(json.loads(body["choices"][0]["text"]), dict)
    plain, named = server.raw(request), server.raw({**request, "response_format": {"type": "text"}})
    assert plain[1]["choices"] == named[1]["choices"]


def test_token_ids_several_prompts_and_n(client, model, tokenizer):
    prompts = ["The", "The quick brown fox jumps"]
    texts = [reference(model, tokenizer, prompt)[1] for prompt in prompts]
    for given in (prompts, [tokenizer(prompt)["input_ids"] for prompt in prompts]):
        answer = client.completions.create(model=NAME, prompt=given, n=2)
        assert [choice.text for choice in answer.choices] == [texts[0], texts[0], texts[1], texts[1]]
        assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
        assert answer.usage.prompt_tokens == sum(len(tokenizer(prompt)["input_ids"]) for prompt in prompts)
    assert client.completions.create(model=NAME, prompt=tokenizer("The")["input_ids"]).choices[0].text == texts[0]
    assert client.completions.create(model=NAME, prompt="").usage.prompt_tokens == 0


@pytest.mark.parametrize("k", [0.0, 0.3])
def test_streams_say_the_same_and_come_by_block(client, k):
    options = {"model": NAME, "max_tokens": 32, "n": 2, "temperature": 1.0, "seed": 3}
    options["extra_body"] = {"mixing_ratio": k, "steps": 16, "block_length": 8}
    whole = client.completions.create(prompt="The quick", **options)
    texts, reasons, chunks, usage = ["", ""], [None, None], 0, None
    stream_options = {"include_usage": True}
    for chunk in client.completions.create(prompt="The quick", stream=True, stream_options=stream_options, **options):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            chunks += 1
            texts[choice.index] += choice.text
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
    assert texts == [choice.text for choice in whole.choices] and texts[0] != texts[1]
    assert reasons == [choice.finish_reason for choice in whole.choices]
    assert usage == whole.usage
    assert chunks > 2 if k == 0 else chunks == 2  # refinement may reach back, so nothing is final before the end


def test_chat_streams(client):
    options = {"model": NAME, "messages": [{"role": "user", "content": "Who?"}], "max_tokens": 16}
    whole = client.chat.completions.create(**options).choices[0]
    chunks = list(client.chat.completions.create(stream=True, **options))
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[0].object == "chat.completion.chunk"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.message.content
    assert chunks[-1].choices[0].finish_reason == whole.finish_reason
    assert len({chunk.id for chunk in chunks}) == 1


def test_stop_strings_end_the_answer_early(client, server, model, tokenizer):
    ids, text, _ = reference(model, tokenizer, "The lazy", length=64)
    stop = text[3:6]
    before = server.metric("xdlm_steps_total")
    answer = client.completions.create(model=NAME, prompt="The lazy", max_tokens=64, stop=[stop, "never to be seen"])
    assert answer.choices[0].text == text[: text.index(stop)] and answer.choices[0].finish_reason == "stop"
    needed = next(n for n in range(len(ids)) if stop in tokenizer.decode(ids[:n], skip_special_tokens=True))
    assert answer.usage.completion_tokens == needed
    assert server.metric("xdlm_steps_total") - before < 64  # the blocks after it were not generated


@pytest.mark.parametrize(
    "extra",
    [
        {"use_cache": "dual", "cache_refresh": 2, "mixing_ratio": 0.3},
        {"confidence_threshold": 0.05},
        {"refinement": "threshold", "edit_threshold": 0.01, "max_edits_per_token": 1, "polish_steps": 2},
    ],
    ids=str,
)
def test_options_of_generate_reach_it(client, model, tokenizer, extra):
    _, text, _ = reference(model, tokenizer, "The lazy", **extra)
    answer = client.completions.create(model=NAME, prompt="The lazy", max_tokens=16, extra_body=extra)
    assert answer.choices[0].text == text


def test_seeds_and_the_ancestral_sampler(client):
    def ask(seed, **extra):
        options = {"model": NAME, "prompt": "A fox", "max_tokens": 12, "seed": seed, "extra_body": extra}
        return client.completions.create(**options).choices[0].text

    assert ask(1, sampler="ancestral", steps=4) == ask(1, sampler="ancestral", steps=4)
    assert ask(1, sampler="ancestral", steps=4) != ask(2, sampler="ancestral", steps=4)


def test_lengths_that_are_no_whole_blocks(client, model, tokenizer):
    ids, _, ended = reference(model, tokenizer, "The", length=11, steps=10)  # blocks of 8 and 3, five steps each
    answer = client.completions.create(model=NAME, prompt="The", max_tokens=11)
    if not ended:
        assert answer.choices[0].text == tokenizer.decode(ids, skip_special_tokens=True)
        assert answer.usage.completion_tokens == 11 and answer.choices[0].finish_reason == "length"


def test_models_health_and_metrics(client, server):
    assert [model.id for model in client.models.list()] == [NAME]
    assert client.models.retrieve(NAME).object == "model"
    assert client.models.retrieve(NAME).max_model_len == 256
    with pytest.raises(openai.NotFoundError, match="model 'other' is not served here"):
        client.models.retrieve("other")
    with urllib.request.urlopen(server.url + "/health") as answer:
        assert json.load(answer) == {"status": "ok", "waiting": 0}
    with urllib.request.urlopen(server.url + "/metrics") as answer:
        shown = answer.read().decode()
    assert 'xdlm_requests_total{path="/v1/models",status="200"}' in shown and "xdlm_batch_rows_bucket" in shown


# ---------------------------------------------------------------------------------------------------------------------
# Connections


@pytest.mark.parametrize("before", ["", "GET /health HTTP/1.1\r\nHost: x\r\n\r\n"], ids=["first", "second"])
def test_a_head_that_does_not_end_is_given_up(model, tokenizer, before):
    server = Server(model, tokenizer, ServerSettings(NAME, header_timeout=0.3))
    handle = slow(model, 0.05)
    try:
        silent = socket.create_connection(server.address, timeout=20)
        slowly = socket.create_connection(server.address, timeout=20)
        slowly.sendall(before.encode() + b"GET /health HTTP/1.1\r\n")
        sending = iter(range(1000))
        with pytest.raises(ConnectionError):
            for i in sending:  # byte by byte, so that it is never idle for long
                slowly.sendall(b"X-Header: %d\r\n" % i)
                time.sleep(0.02)
        assert not silent.recv(1)
        # An answer that takes longer than that is not cut off.
        options = {"model": NAME, "prompt": "The", "max_tokens": 16}
        assert server.client().completions.create(**options).choices[0].finish_reason
    finally:
        handle.remove()
        server.stop()


@pytest.mark.parametrize("key", [None, "secret"])
def test_a_name_that_points_here_is_refused_without_a_key(model, tokenizer, key):
    """Its owner's web pages would be of the server's origin (DNS rebinding)."""
    server = Server(model, tokenizer, ServerSettings(NAME, api_key=key, local_only=True))

    def models(host):
        request = urllib.request.Request(server.url + "/v1/models", headers={"Host": host})
        request.add_header("Authorization", f"Bearer {key}")
        try:
            with urllib.request.urlopen(request) as answer:
                return answer.status, ""
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read())["error"]["message"]

    try:
        for host in ("127.0.0.1:8000", "localhost", "localhost:8000", "[::1]:8000", "10.0.0.7"):
            assert models(host) == (200, "")
        for host in ("evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.evil.example"):
            status, message = models(host)
            assert status == (403 if key is None else 200)
            assert key or "answers only under localhost or an address. Use one of them, or start it with" in message
    finally:
        server.stop()


def test_cors_lets_the_pages_named_in(model, tokenizer):
    mine, other = "http://localhost:3000", "http://example.org"
    server = Server(model, tokenizer, ServerSettings(NAME, cors=(mine,), api_key="secret"))

    def preflight(origin):
        headers = {"Origin": origin, "Access-Control-Request-Method": "POST"}
        headers["Access-Control-Request-Headers"] = "authorization,content-type,x-stainless-lang"
        request = urllib.request.Request(server.url + "/v1/completions", method="OPTIONS", headers=headers)
        try:
            with urllib.request.urlopen(request) as answer:
                return answer.status, dict(answer.headers)
        except urllib.error.HTTPError as error:
            return error.code, dict(error.headers)

    try:
        status, headers = preflight(mine)
        assert status == 200 and headers["access-control-allow-origin"] == mine
        assert "x-stainless-lang" in headers["access-control-allow-headers"]
        assert "access-control-allow-credentials" not in headers
        status, headers = preflight(other)
        assert status == 400 and "access-control-allow-origin" not in headers
        request = urllib.request.Request(server.url + "/v1/models", headers={"Origin": mine})
        with pytest.raises(urllib.error.HTTPError, match="401") as refused:  # the page may read why
            urllib.request.urlopen(request)
        assert refused.value.headers["access-control-allow-origin"] == mine
    finally:
        server.stop()


# ---------------------------------------------------------------------------------------------------------------------
# Load


async def one_of_many(i, client, address, kinds):
    """Request number `i`: every fourth is a fault. What came of it."""
    kind = kinds[i % len(kinds)]
    options = {"model": NAME, "prompt": "The quick " * (1 + i % 3), "max_tokens": 16 + 8 * (i % 2)}
    start = time.monotonic()
    try:
        if kind == "leaves":
            reader, writer = await asyncio.open_connection(*address)
            body = json.dumps(options | {"stream": i % 8 < 4}).encode()
            head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: "
            writer.write(head.encode() + str(len(body)).encode() + b"\r\n\r\n" + body)
            await writer.drain()
            await asyncio.sleep(0.002 * (i % 50))
            writer.close()
            return "left", 0.0, 0
        if kind == "huge":
            await client.completions.create(**options | {"prompt": "x" * (1 << 21)})
        if kind == "wrong":
            await client.completions.create(**options, extra_body={"stepz": 3})
        if kind == "stream":
            text = ""
            async for chunk in await client.completions.create(stream=True, **options):
                text += chunk.choices[0].text
                reason = chunk.choices[0].finish_reason
            return ("answered" if reason else "cut off"), time.monotonic() - start, len(text)
        answer = await client.completions.create(**options)
        return "answered", time.monotonic() - start, answer.usage.completion_tokens
    except openai.APIStatusError as error:
        return f"status {error.status_code}", time.monotonic() - start, 0


def test_two_hundred_concurrent_requests_with_faults(model, tokenizer, record_property):
    """Nothing is lost: every request is answered or refused; nothing is left behind when it is over."""
    settings = ServerSettings(NAME, Limits(max_new_tokens=128), Defaults(block_length=8))
    server = Server(model, tokenizer, settings, max_batch_rows=16, max_queue=150)
    jobs, submit = [], server.engine.submit
    server.engine.submit = lambda request: (jobs.append(submit(request)), jobs[-1])[1]
    kinds = [
        "plain",
        "stream",
        "plain",
        "leaves",
        "plain",
        "stream",
        "plain",
        "huge",
        "plain",
        "stream",
        "plain",
        "wrong",
    ]

    async def everybody():
        async with openai.AsyncOpenAI(
            base_url=server.url + "/v1", api_key="none", max_retries=0, timeout=PATIENCE
        ) as client:
            return await asyncio.gather(*(one_of_many(i, client, server.address, kinds) for i in range(200)))

    # 150 of the 200 want an answer and 17 leave. The engine goes on when 120 wait, with two settings: they are 9
    # batches at most, and the 46 others one each at worst. That makes 150 rows in 56 batches.
    full = threading.Event()

    def crowded():
        if server.engine.queue_length >= 120:
            full.set()
        return full.is_set()

    try:
        tasks = server.tasks()
        start = time.monotonic()
        with held(model, crowded):
            results = asyncio.run(everybody())
        seconds = time.monotonic() - start
        wait_until(lambda: not server.engine.queue_length and server.metric("xdlm_running_rows") == 0)
        wait_until(lambda: server.tasks() == tasks)
        # Every job that was taken in came to its end, or was given up because its client had left.
        assert all(job.over or job.cancelled for job in jobs)
        assert sum(job.over for job in jobs) == server.metric("xdlm_request_seconds_count")
        assert sum(job.cancelled for job in jobs) == server.metric("xdlm_cancelled_total")
        counts = {}
        for outcome, _, _ in results:
            counts[outcome] = counts.get(outcome, 0) + 1
        expected = {kind: sum(kinds[i % len(kinds)] == kind for i in range(200)) for kind in kinds}
        assert counts.pop("left") == expected["leaves"]
        assert counts.pop("status 413") == expected["huge"] and counts.pop("status 400") == expected["wrong"]
        refused = counts.pop("status 429", 0)
        assert counts == {"answered": expected["plain"] + expected["stream"] - refused} and refused < 20
        latencies = sorted(latency for outcome, latency, _ in results if outcome == "answered")
        figures = {
            "seconds": round(seconds, 2),
            "answered": counts["answered"],
            "refused_429": refused,
            "median_latency_s": round(latencies[len(latencies) // 2], 3),
            "p95_latency_s": round(latencies[int(len(latencies) * 0.95)], 3),
            "tokens_per_s": round(server.metric("xdlm_completion_tokens_total") / seconds),
            "batches": int(server.metric("xdlm_batch_rows_count")),
            "mean_batch_rows": round(server.metric("xdlm_batch_rows_sum") / server.metric("xdlm_batch_rows_count"), 2),
            "cancelled": int(server.metric("xdlm_cancelled_total")),
        }
        for name, value in figures.items():
            record_property(name, value)
        print(figures)
        assert figures["mean_batch_rows"] > 2
    finally:
        server.stop()


# ---------------------------------------------------------------------------------------------------------------------
# The command


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--model", "/nowhere/at/all"], "model='/nowhere/at/all' cannot be read"),
        (["--model", "x", "--device", "abacus"], "device='abacus' is not known to PyTorch"),
    ],
)
def test_command_line_refusals(arguments, message):
    with pytest.raises(SystemExit, match=f"xdlm-serve: {message}"):
        main([*arguments, "--port", "0"])


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--max_queue", "0"], "--max_queue 0 must be positive"),
        (["--port", "65536"], "--port 65536 must be from 0 to 65535"),
        (["--drain_timeout", "-1"], "--drain_timeout -1.0 must be 0 or more seconds"),
        (["--drain_timeout", "nan"], "--drain_timeout nan must be 0 or more seconds"),
        (["--cors", "*"], "--cors * lets every web page use this server; name the origins, or set --api_key"),
        (["--cors", "localhost:3000"], "--cors localhost:3000 is no origin"),
        (["--cors", "http://localhost:3000/"], "--cors http://localhost:3000/ is no origin"),
        (["--api_key", "clé"], "--api_key must be ASCII"),
    ],
)
def test_options_that_are_not_possible(arguments, message, capsys, monkeypatch):
    monkeypatch.delenv("XDLM_API_KEY", raising=False)
    with pytest.raises(SystemExit):
        main(["--model", "/nowhere/at/all", *arguments])
    assert message in capsys.readouterr().err


def test_a_busy_port_is_named_before_the_model_is_read():
    with socket.create_server(("127.0.0.1", 0)) as busy:
        port = busy.getsockname()[1]
        message = f"cannot listen on --host 127.0.0.1 --port {port}: Address already in use.*; choose another port"
        with pytest.raises(SystemExit, match=message):
            main(["--model", "/nowhere/at/all", "--port", str(port)])


def test_sigterm_lets_a_stream_finish_and_exits_with_0(tokenizer, tmp_path):
    slow_enough = model_of(tokenizer, max_sequence_length=256, mlp_hidden_size=1024)  # to be at work for a while
    save_checkpoint(tmp_path, slow_enough, tokenizer)
    command = [sys.executable, "-m", "xdlm_hf.serving", "--model", str(tmp_path), "--served_name", NAME, "--port", "0"]
    command += ["--drain_timeout", "300"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        try:
            log = ""
            while "Application startup complete" not in log:
                line = process.stderr.readline()
                assert line, f"the server ended: {log}"
                log += line
            url = re.search(r"serving tiny on (http://127.0.0.1:\d+/v1)", log)[1]
            threading.Thread(target=process.stderr.read, daemon=True).start()
            client = openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=60)
            options = {"prompt": "The", "max_tokens": 240, "stream": True, "extra_body": {"block_length": 4}}
            chunks = iter(client.completions.create(model=NAME, **options))
            read = [next(chunks)]
            process.send_signal(signal.SIGTERM)
            read += chunks
            assert read[-1].choices[0].finish_reason in ("stop", "length")
            assert process.wait(60) == 0
        finally:
            process.kill()
    with pytest.raises(openai.APIConnectionError):
        client.models.list()
