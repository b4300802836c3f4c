"""Requests: what is refused and how, what is accepted, and prompts that are too long."""

import copy
import json
import random
import threading

import pytest
from servers import NAME, PATIENCE, Server, openai, wait_until
from tokenizers import AddedToken, normalizers, pre_tokenizers

from xdlm_hf.serving.app import ServerSettings
from xdlm_hf.serving.fields import NEUTRAL, RequestError, read_fields
from xdlm_hf.serving.prompts import PromptReader, TokenFloor
from xdlm_hf.serving.requests import Defaults, Limits, parse

# ---------------------------------------------------------------------------------------------------------------------
# Refusals


def schema_format(schema):
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}


NESTED = {"type": "null"}
for _ in range(400):
    NESTED = {"type": "array", "items": NESTED}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"temprature": 1}, "'temprature' is not known; known are block_length"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {}}},
            'response_format must be {"type": "text"}, {"type": "json_object"} or {"type": "json_schema", "json_',
        ),
        ({"response_format": "json"}, "response_format must be"),
        (
            {"response_format": schema_format({"type": "number", "multipleOf": 2})},
            "at #: 'multipleOf' is not supported",
        ),
        ({"response_format": schema_format(NESTED)}, "response_format: json_schema is nested too deeply"),
        ({"response_format": {"type": "json_object"}, "stop": "}"}, "stop may cut the JSON that response_format asks"),
        ({"response_format": {"type": "json_object"}, "block_length": 8}, "so it does not go with json_schema"),
        (
            {"response_format": {"type": "json_object"}, "max_tokens": 1},
            "max_new_tokens=1 is too short for json_schema",
        ),
        ({"guided_grammar": "root ::= x"}, "guided_grammar is not supported: answers are constrained by response_f"),
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
        ({"sampler": "beam"}, "sampler='beam' is not known; choose one of ['confidence', 'ancestral']"),
        ({"sampler": "ancestral", "block_length": 8}, "sampler='ancestral' has no option block_length"),
        ({"sampler": "ancestral", "temperature": 0}, "temperature=0.0 must be positive for sampler='ancestral'"),
        ({"mixing_ratio": 2}, "mixing_ratio=2 must lie in [0, 1]"),
        ({"mixing_ratio": 10**400}, "must be a finite number"),
        ({"confidence_threshold": 10**400}, "must be a finite number"),
        ({"use_cache": "paged"}, "use_cache='paged' is not known; choose one of ['prefix', 'dual', False]"),
        ({"cache_refresh": 2}, "cache_refresh=2 needs a cache"),
        ({"confidence_threshold": 2}, "confidence_threshold=2 must lie in (0, 1]"),
        ({"refinement": "threshold"}, "refinement='threshold' needs edit_threshold"),
        ({"mixing_ratio": 0, "max_edits_per_token": 2}, "max_edits_per_token=2 has no effect"),  # by generate
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
