"""xdlm-serve over a real socket, with OpenAI's client: answers, refusals, batches, disconnects, load with faults."""

import asyncio
import contextlib
import copy
import itertools
import json
import os
import random
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
import torch
from tokenizers import AddedToken, normalizers, pre_tokenizers

pytest.importorskip("fastapi", reason="serving needs the extra `serve`")
pytest.importorskip("prometheus_client", reason="serving needs the extra `serve`")
pytest.importorskip("uvicorn", reason="serving needs the extra `serve`")
openai = pytest.importorskip("openai", reason="the tests of the server use OpenAI's client")

from xdlm_hf import LLaDAConfig, LLaDAForDiffusionLM, XDLMGenerationConfig  # noqa: E402
from xdlm_hf.data.tokenizer import train_tokenizer  # noqa: E402
from xdlm_hf.serving import server as serving  # noqa: E402
from xdlm_hf.serving.answers import Answer  # noqa: E402
from xdlm_hf.serving.app import ServerSettings  # noqa: E402
from xdlm_hf.serving.engine import Engine, Job  # noqa: E402
from xdlm_hf.serving.fields import NEUTRAL, RequestError, read_fields  # noqa: E402
from xdlm_hf.serving.prompts import PromptReader, TokenFloor  # noqa: E402
from xdlm_hf.serving.requests import Defaults, Limits, parse  # noqa: E402
from xdlm_hf.serving.server import main  # noqa: E402

NAME = "tiny"
PATIENCE = 120  # seconds before a test takes something for lost; no verdict depends on what happens sooner


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["The quick brown fox jumps over the lazy dog. naïve 漢字"] * 4, vocab_size=300)


@pytest.fixture(scope="module")
def model(tokenizer):
    ids = {name: getattr(tokenizer, name) for name in ("mask_token_id", "eos_token_id", "pad_token_id")}
    torch.manual_seed(0)
    config = LLaDAConfig(
        d_model=32,
        n_heads=2,
        n_layers=1,
        mlp_hidden_size=64,
        vocab_size=len(tokenizer),
        embedding_size=len(tokenizer),
        max_sequence_length=256,
        init_std=0.3,
        **ids,
    )
    return LLaDAForDiffusionLM(config).eval()


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


@pytest.fixture(scope="module")
def server(model, tokenizer):
    settings = ServerSettings(NAME, Limits(max_new_tokens=128), Defaults(max_tokens=16, block_length=8))
    running = Server(model, tokenizer, settings)
    yield running
    running.stop()


@pytest.fixture(scope="module")
def client(server):
    return server.client()


def reference(model, tokenizer, prompt, length=16, **options):
    """What the model answers without a server: ids up to the end of text, and their text."""
    ids = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    settings = {"max_new_tokens": length, "steps": length, "block_length": 8} | options
    answer = model.generate(**ids, **settings)[0, ids["input_ids"].shape[1] :].tolist()
    ended = tokenizer.eos_token_id in answer
    answer = answer[: answer.index(tokenizer.eos_token_id)] if ended else answer
    return answer, tokenizer.decode(answer, skip_special_tokens=True), ended


# ---------------------------------------------------------------------------------------------------------------------
# Text of an answer


class Spelled:
    """A tokenizer of single letters, and <e> for the end."""

    all_special_tokens = ["<e>", "<t>"]

    def convert_tokens_to_ids(self, tokens):
        return [{"<e>": 0, "<t>": 1}[token] for token in tokens]

    def decode(self, ids, **_):
        return bytes(ids).decode(errors="replace")


def feed(parts, stops=(), most=100):
    answer = Answer(Spelled(), {0}, stops, most)
    return [answer.feed(part) for part in parts], answer


def test_text_comes_as_soon_as_it_is_sure():
    pieces, answer = feed([b"ab", b"c\xc3", b"\xa9d", b"e\0zz", b"y"])
    assert pieces == ["ab", "c", "éd", "e", ""] and answer.text == "abcéde"
    assert answer.finish_reason == "stop" and answer.tokens == 8


def test_half_a_stop_string_waits_and_a_whole_one_is_never_sent():
    pieces, answer = feed([b"abEN", b"Xc E", b"ND hidden"], stops=("END", "nothing"))
    assert pieces == ["ab", "ENXc ", ""] and answer.finish_reason == "stop"
    assert answer.tokens == len("abENXc END")
    pieces, answer = feed([b"abE"], stops=("END",), most=3)
    assert pieces == ["abE"] and answer.finish_reason == "length"  # nothing follows that could complete it


def test_a_special_token_stops_by_its_id():
    pieces, answer = feed([b"ab\1c"], stops=("<t>",))
    assert pieces == ["ab"] and answer.finish_reason == "stop" and answer.tokens == 3


def test_length_ends_an_answer():
    pieces, answer = feed([b"abcd", b"ef"], most=3)
    assert pieces == ["abc", ""] and answer.finish_reason == "length" and answer.tokens == 3


def test_a_stop_string_within_the_length_wins():
    assert feed([b"aENDb"], stops=("END",), most=4)[1].finish_reason == "stop"


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
# Refusals


@pytest.mark.parametrize(
    "change, message",
    [
        ({"temprature": 1}, "'temprature' is not known; known are block_length"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {}}},
            "response_format is not supported: constrained",
        ),
        ({"guided_grammar": "root ::= x"}, "guided_grammar is not supported: constrained decoding"),
        ({"logprobs": 3}, "logprobs is not supported: log-prob"),
        ({"echo": True}, "echo is not supported"),
        ({"frequency_penalty": 0.5}, "frequency_penalty is not supported: tokens are filled in no fixed order"),
        ({"top_k": 40}, "top_k is not supported: use top_p and a temperature above 0; leave it out or send -1"),
        ({"min_p": 0.1}, "min_p is not supported: use top_p"),
        ({"repetition_penalty": 1.1}, "temperature and top_p; leave it out or send 1."),
        ({"best_of": 3}, "best_of is not supported: there are no log-probabilities to choose by; use n"),
        ({"use_beam_search": True}, "use_beam_search is not supported: use n; leave it out or send false"),
        ({"top_logprobs": False}, "top_logprobs is not supported"),  # false is not 0
        ({"add_special_tokens": False}, "add_special_tokens is not supported"),
        (
            {"stream": True, "stream_options": {"continuous_usage_stats": True}},
            "continuous_usage_stats is not supported",
        ),
        ({"max_tokens": 129}, "max_tokens=129 is above this server's 128"),
        ({"max_tokens": 0}, "max_tokens=0 must be an integer from 1"),
        ({"max_tokens": True}, "max_tokens=True must be an integer"),
        ({"n": 9}, "1 prompts with n=9 are 9 answers, more than this server's 8"),
        ({"temperature": "hot"}, "temperature='hot' must be a number from 0 to 2"),
        ({"top_p": 0.5}, "top_p=0.5 filters a draw and needs a temperature"),
        ({"seed": 2**64}, "seed=18446744073709551616 must be an integer"),
        ({"stop": ["a"] * 5}, "stop must be a string or up to 4"),
        ({"stop": ""}, "stop must be a string or up to 4, none empty"),
        ({"stream_options": {"include_usage": True}}, "stream_options needs stream=true"),
        ({"prompt": [1, 999999]}, "prompt holds 999999, which is no token id"),
        ({"prompt": []}, "prompt is an empty list"),
        ({"prompt": [["a"]]}, "prompt must be a string, token ids, or a list of either"),
        ({"prompt": ["The"] * 9}, "9 prompts with n=1 are 9 answers"),
        ({"prompt": {"a": 1}}, "prompt must be a string"),
        ({"prompt": None}, "prompt is missing"),
        ({"prompt": [7] * 241}, "a prompt of 241 tokens is too long: with 16 tokens for the answer, 240 are left"),
        ({"steps": 17}, "steps=17 is more than max_new_tokens=16"),
        ({"steps": 1}, "steps=1 is too few for the 2 blocks of 8 tokens"),
        ({"steps": 129}, "steps=129 is above this server's 128"),
        ({"sampler": "beam"}, "sampler='beam' is not known; choose one of confidence, ancestral"),
        ({"sampler": "ancestral", "block_length": 8}, "sampler='ancestral' has no option block_length"),
        ({"sampler": "ancestral", "temperature": 0}, "temperature=0.0 must be positive for sampler='ancestral'"),
        ({"mixing_ratio": 2}, "mixing_ratio=2 must be a number from 0 to 1"),
        ({"use_cache": "paged"}, "use_cache='paged' is not known; choose one of ['prefix', 'dual', False]"),
        ({"cache_refresh": 2}, "cache_refresh=2 refreshes no cache"),
        ({"confidence_threshold": 2}, "confidence_threshold=2 must lie in (0, 1]"),
        ({"refinement": "threshold"}, "refinement='threshold' needs edit_threshold"),
        ({"mixing_ratio": 0, "max_edits_per_token": 2}, "max_edits_per_token=2 bounds a refinement"),  # by generate
    ],
)
def test_refusals_name_the_field_and_the_remedy(server, change, message):
    status, body = server.raw({"model": NAME, "prompt": "The", "max_tokens": 16} | change)
    assert status == 400 and set(body["error"]) == {"message", "type", "param", "code"}
    assert message in body["error"]["message"] and body["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "messages, message",
    [
        ([], "messages must be a list of at least one"),
        ([{"role": "tool", "content": "x"}], r"messages[0] must be an object whose role is one of"),
        ([{"role": {"a": 1}, "content": "x"}], r"messages[0] must be an object whose role is one of"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "messages[0].content must be a string or a list of"),
        ([{"role": "assistant", "tool_calls": [1]}], "messages[0].tool_calls is not supported"),
    ],
)
def test_chat_refusals(server, messages, message):
    status, body = server.raw({"model": NAME, "messages": messages}, "/v1/chat/completions")
    assert status == 400 and message in body["error"]["message"]


@pytest.mark.parametrize("chat", [False, True])
def test_values_that_ask_for_nothing_are_accepted(server, chat):
    """All at once, null where a field has no other; then every further value by itself."""
    path = "/v1/chat/completions" if chat else "/v1/completions"
    body = {"model": NAME, "max_tokens": 8, "top_p": 1, "user": "me", "n": None, "stop": [], "safety_identifier": "me"}
    body |= {"messages": [{"role": "user", "content": "x"}]} if chat else {"prompt": "The"}
    neutral = {name: values[0] if values else None for name, values in NEUTRAL.items()}
    status, answer = server.raw(body | neutral | {"add_special_tokens": not chat}, path)
    assert status == 200, answer
    for name, value in [(name, value) for name, values in NEUTRAL.items() for value in values[1:]]:
        assert read_fields(body | {name: value}, chat) == read_fields(body, chat)
    for change in ({"repetition_penalty": 1.0, "min_p": 0.0}, {"top_k": -1.0}, {"stop": None, "logprobs": None}):
        assert read_fields(body | change, chat)["max_tokens"] == 8
    options = {"include_usage": False, "include_obfuscation": False, "continuous_usage_stats": None}
    assert read_fields(body | {"stream": True, "stream_options": options}, chat)["stream"]


LONE = "\ud800"


@pytest.mark.parametrize(
    "change, field",
    [
        ({"prompt": f"The {LONE}"}, "prompt"),
        ({"prompt": ["The", LONE]}, "prompt"),
        ({"messages": [{"role": "user", "content": "\udfff"}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": LONE}]}]}, "messages"),
        ({"messages": [{"role": LONE, "content": "x"}]}, "messages"),
        ({"messages": [{"role": "user", "content": "x", LONE: 1}]}, "messages"),
        ({"messages": [{"role": "user", "content": "x", "name": LONE}]}, "messages"),
        ({"stop": [LONE]}, "stop"),
        ({"user": LONE}, "user"),
        ({"model": LONE}, "model"),
        ({"metadata": {"a": [[{LONE: None}]]}}, "metadata"),
        ({LONE: 1}, "a field's name"),
        ({"stream": True, "stream_options": {LONE: True}}, "stream_options"),
    ],
    ids=ascii,
)
def test_half_a_surrogate_pair_is_refused_wherever_text_comes_in(server, change, field):
    chat = "messages" in change
    body = {"model": NAME, "max_tokens": 8} | ({} if chat else {"prompt": "The"}) | change
    status, answer = server.raw(body, "/v1/chat/completions" if chat else "/v1/completions")
    assert status == 400 and answer["error"]["message"].startswith(f"{field} holds half of a surrogate pair")
    whole = json.dumps(body).replace("\\ud800", "\\ud83d\\ude00").replace("\\udfff", "\\ud83d\\ude00")
    assert "surrogate" not in str(server.raw(whole.encode(), "/v1/chat/completions" if chat else "/v1/completions"))


@pytest.mark.parametrize(
    "body, headers, status, message",
    [
        (b"{", (), 400, "the body is not JSON"),
        (b"[1]", (), 400, "the body must be a JSON object"),
        (b"\xff\xfe", (), 400, "the body is not JSON"),
        (b'{"prompt": "\xed\xa0\x80"}', (), 400, "the body is not JSON"),  # a surrogate in UTF-8
        (b"[" * 200_000, (), 400, "the body is not JSON"),
        (b"{}", ("Content-Type: text/plain",), 415, "Content-Type: application/json"),
        (b"{}", (), 404, "model=None is not served here; use 'tiny'"),
        (b'{"prompt": "' + b"x" * (1 << 21) + b'"}', (), 413, "larger than this server's 1048576 bytes"),
    ],
)
def test_bodies_that_are_no_requests(server, body, headers, status, message):
    got, answer = server.raw(body, headers=headers)
    assert got == status and message in answer["error"]["message"]


def test_unknown_paths_and_methods(server):
    status, answer = server.raw(b"{}", "/v1/embeddings")
    assert status == 404 and answer["error"]["message"] == "Not Found: /v1/embeddings"
    status, answer = server.raw(b"{}", "/v1/models")
    assert status == 405 and "Method Not Allowed" in answer["error"]["message"]


def test_api_key_queue_limit_and_failures(model, tokenizer, monkeypatch):
    server = Server(model, tokenizer, ServerSettings(NAME, api_key="secret"), max_queue=1)
    try:
        with pytest.raises(openai.AuthenticationError, match="a valid API key is needed"):
            server.client(api_key="wrong").models.list()
        client = server.client(api_key="secret")
        gate, original = threading.Event(), model.generate

        def blocked(**options):
            assert gate.wait(PATIENCE)
            return original(**options)

        monkeypatch.setattr(model, "generate", blocked, raising=False)
        options = {"model": NAME, "prompt": "The", "max_tokens": 8}
        answers = []
        threads = [threading.Thread(target=lambda: answers.append(client.completions.create(**options))) for _ in "ab"]
        threads[0].start()
        wait_until(lambda: server.metric("xdlm_batch_rows_count") == 1)
        threads[1].start()
        wait_until(lambda: server.engine.queue_length == 1)
        with pytest.raises(openai.RateLimitError, match="1 requests are waiting"):
            client.completions.create(**options)
        gate.set()
        for thread in threads:
            thread.join(PATIENCE)
        assert len(answers) == 2

        monkeypatch.setattr(model, "generate", lambda **_: 1 / 0)
        with pytest.raises(openai.InternalServerError, match="generation failed: ZeroDivisionError"):
            client.completions.create(**options)
        with pytest.raises(openai.APIError, match="generation failed"):
            list(client.completions.create(stream=True, **options))
        monkeypatch.setattr(model, "generate", original)
        assert client.completions.create(**options).choices  # and it lives on
    finally:
        server.stop()


def test_base_models_have_no_chat(model, tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", None)
    server = Server(model, tokenizer, ServerSettings(NAME))
    try:
        with pytest.raises(openai.BadRequestError, match="no chat template, so it is a base model; use /v1/comp"):
            server.client().chat.completions.create(model=NAME, messages=[{"role": "user", "content": "x"}])
    finally:
        server.stop()


# ---------------------------------------------------------------------------------------------------------------------
# Batches and disconnects


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


# ---------------------------------------------------------------------------------------------------------------------
# Length


def test_the_floor_is_never_above_the_tokens(tokenizer):
    floor, draw = TokenFloor.of(tokenizer), random.Random(0)
    vocabulary = [tokenizer.decode([i]) for i in range(len(tokenizer))]
    longest = max(vocabulary, key=len)
    assert floor("") == 0 and floor(longest * 1000) >= 1000 * len(longest) / max(map(len, vocabulary))
    for length in (1, 3, 10, 300):
        for pieces in (
            vocabulary,
            ["  ", "\n", "naïve", "漢", "\0", "\u0301", "😀"],
            [longest],
            [" fox", "<|mdm_mask|>"],
        ):
            for _ in range(20):
                text = "".join(draw.choice(pieces) for _ in range(length))
                count = len(tokenizer(text)["input_ids"])
                assert floor(text) <= count
                assert count <= 12 * floor(text)  # and it says something


@pytest.mark.parametrize(
    "change",
    [
        lambda backend: setattr(backend, "normalizer", normalizers.Strip()),
        lambda backend: setattr(
            backend,
            "pre_tokenizer",
            pre_tokenizers.Sequence([pre_tokenizers.Split(" ", "removed"), backend.pre_tokenizer]),
        ),
        lambda backend: setattr(backend, "pre_tokenizer", pre_tokenizers.Whitespace()),
        lambda backend: setattr(backend, "pre_tokenizer", None),
        lambda backend: backend.add_tokens([AddedToken("<x>", lstrip=True)]),
    ],
    ids=["normalizer", "removed", "whitespace", "none", "lstrip"],
)
def test_no_floor_where_text_may_be_dropped(tokenizer, change):
    """Each of these tokenizers makes few tokens of many blanks, or may do so."""
    tokenizer = copy.deepcopy(tokenizer)
    change(tokenizer.backend_tokenizer)
    assert TokenFloor.of(tokenizer) is None


@pytest.mark.parametrize("chat", [False, True])
def test_a_prompt_far_too_long_is_refused_without_tokenizing_it(model, tokenizer, monkeypatch, chat):
    floor, limits = TokenFloor.of(tokenizer), Limits()

    def ask(text, max_tokens=16, n=1):
        body = {"model": NAME, "max_tokens": max_tokens, "n": n}
        body |= {"messages": [{"role": "user", "content": text}]} if chat else {"prompt": text}
        return parse(body, chat, NAME, tokenizer, model.config, limits, Defaults(), floor)

    def unwanted(*_, **__):
        raise AssertionError("tokenized")

    repeated = "fox" + " fox" * (240 - ask("fox").prompt_tokens)
    fits = ask(repeated)  # as many tokens as there is room for
    with pytest.raises(RequestError, match="a prompt of 241 tokens is too long: with 16 .* 240 are left"):
        ask(repeated + " fox")
    assert fits.prompt_tokens == 240
    monkeypatch.setattr(type(tokenizer), "_encode_plus", unwanted)
    with pytest.raises(AssertionError, match="tokenized"):
        ask("fox")
    with pytest.raises(RequestError, match="a prompt of at least .* tokens is too long: with 16 tokens") as refusal:
        ask("x" * 900_000)
    assert refusal.value.code == "context_length_exceeded"
    with pytest.raises(RequestError, match="n=9 are 9 answers"):
        ask("fox", n=9)


def test_a_long_prompt_holds_up_no_short_one(server, client, monkeypatch):
    """Neither the event loop nor other requests wait until it is tokenized."""
    begun, gate, original = threading.Event(), threading.Event(), PromptReader._tokenize

    def blocked(self, text, *args, **options):
        if len(text) > 1000:
            begun.set()
            assert gate.wait(20)
        return original(self, text, *args, **options)

    monkeypatch.setattr(PromptReader, "_tokenize", blocked)
    answers = []
    body = {"model": NAME, "prompt": "x" * 900_000, "max_tokens": 8}
    thread = threading.Thread(target=lambda: answers.append(server.raw(body)))
    thread.start()
    try:
        assert begun.wait(20)
        assert client.completions.create(model=NAME, prompt="The", max_tokens=8).choices and not answers
    finally:
        gate.set()
        thread.join(20)
    assert answers[0][0] == 400 and answers[0][1]["error"]["code"] == "context_length_exceeded"


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


def test_sigterm_lets_a_stream_finish_and_exits_with_0(model, tokenizer, tmp_path):
    torch.manual_seed(0)
    config = copy.deepcopy(model.config)
    config.mlp_hidden_size = 1024  # slow enough to be at work for a while
    LLaDAForDiffusionLM(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
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
