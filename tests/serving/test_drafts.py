"""Drafts of a stream: the answer after each step, for those who ask."""

import asyncio
import json
import math
import threading
import urllib.request

import pytest
import torch
from servers import NAME, PATIENCE, held, openai, wait_until

from xdlm_hf.serving.drafts import Draft, DraftRecorder, draft_body
from xdlm_hf.serving.engine import DRAFTS_KEPT, Done, Job, Piece
from xdlm_hf.watch.tokens import TokenPieces, token_changes

MASK = 5  # of the tokenizers that train_tokenizer makes


def ask(client, **change):
    """The drafts of one answer, as the client's objects, and its text."""
    options = {"model": NAME, "prompt": "The quick", "max_tokens": 16, "stream": True} | change
    options["extra_body"] = {"stream_drafts": True} | options.get("extra_body", {})
    create = client.chat.completions.create if "messages" in change else client.completions.create
    if "messages" in change:
        options.pop("prompt")
    chunks = list(create(**options))
    drafts = [choice.draft for chunk in chunks for choice in chunk.choices if hasattr(choice, "draft")]
    return drafts, chunks


def states(drafts):
    return [[cell["id"] for cell in draft["cells"]] for draft in drafts]


@pytest.mark.parametrize(
    "extra",
    [
        {"mixing_ratio": 0.0, "block_length": 8},  # the first block is final before the second begins
        {"mixing_ratio": 0.6, "steps": 8},
        {"mixing_ratio": 0.6, "steps": 8, "polish_steps": 3, "refinement": {"policy": "threshold", "threshold": 0.01}},
        {"sampler": "ancestral", "steps": 6},
    ],
    ids=str,
)
def test_drafts_are_the_history_of_generate(client, model, tokenizer, extra):
    steps = extra.get("steps", 16)
    draws = {"temperature": 1.0, "seed": 4}
    drafts, chunks = ask(client, **draws, extra_body=extra)
    ids = tokenizer("The quick", return_tensors="pt", return_token_type_ids=False)
    options = {"max_new_tokens": 16, "steps": steps, **draws, **extra}
    if extra.get("sampler") != "ancestral":
        options.setdefault("block_length", 8)
    output = model.generate(**ids, **options, return_dict_in_generate=True, output_history=True)
    start = ids["input_ids"].shape[1]
    history = [state[0, start:] for state in output.history]
    total = steps + extra.get("polish_steps", 0)
    assert states(drafts) == [state.tolist() for state in history[1 : len(drafts) + 1]]
    assert [draft["step"] for draft in drafts] == list(range(1, len(drafts) + 1))
    assert {draft["steps"] for draft in drafts} == {total} and len(drafts) == len(history) - 1
    for number, draft in enumerate(drafts, 1):
        before = history[number - 1] if number > 1 else torch.full_like(history[0], MASK)
        for kind, mask in token_changes(before, history[number], MASK)._asdict().items():
            assert [cell.get("change") == kind for cell in draft["cells"]] == mask.tolist()
        assert [cell.get("mask", False) for cell in draft["cells"]] == (history[number] == MASK).tolist()
        if output.confidences is None:
            assert not any("confidence" in cell for cell in draft["cells"])
        else:
            expected = output.confidences[number][0, start:].tolist()
            given = [cell.get("confidence", math.nan) for cell in draft["cells"]]
            assert given == pytest.approx(expected, abs=1e-4, nan_ok=True)
    assert all(chunk.choices[0].text == "" for chunk in chunks if hasattr(chunk.choices[0], "draft"))


def test_clients_that_know_no_drafts_see_the_same_answer(client):
    """OpenAI's client makes an object of every event, whatever its name: a draft is a piece without text."""
    plain = {"model": NAME, "max_tokens": 16, "extra_body": {"mixing_ratio": 0.5}}
    for create, prompt in (
        (client.completions.create, {"prompt": "The lazy"}),
        (client.chat.completions.create, {"messages": [{"role": "user", "content": "Who?"}]}),
    ):
        whole = create(**plain, **prompt).choices[0]
        options = plain | {"extra_body": {"mixing_ratio": 0.5, "stream_drafts": True}}
        chunks = list(create(**options, **prompt, stream=True, stream_options={"include_usage": True}))
        *chunks, last = chunks
        if "messages" in prompt:
            text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
            assert text == whole.message.content
        else:
            assert "".join(chunk.choices[0].text for chunk in chunks) == whole.text
        assert chunks[-1].choices[0].finish_reason == whole.finish_reason and last.usage.completion_tokens
        assert len({chunk.id for chunk in chunks}) == 1 and len(chunks) > 16


def test_drafts_of_several_answers_are_told_apart(client, tokenizer):
    options = {"model": NAME, "prompt": ["The", "A fox jumps"], "n": 2, "max_tokens": 8, "temperature": 1.0}
    extra = {"stream_drafts": True, "mixing_ratio": 0.5}
    chunks = list(client.completions.create(**options, stream=True, extra_body=extra))
    last, texts = {}, {}
    for choice in (choice for chunk in chunks for choice in chunk.choices):
        texts[choice.index] = texts.get(choice.index, "") + choice.text
        if hasattr(choice, "draft"):
            last[choice.index] = choice.draft
    assert sorted(last) == [0, 1, 2, 3] and {draft["step"] for draft in last.values()} == {8}
    for index, draft in last.items():
        whole = tokenizer.decode([cell["id"] for cell in draft["cells"]], skip_special_tokens=True)
        assert texts[index] and whole.startswith(texts[index])


def test_parts_of_a_character_come_as_bytes(tokenizer):
    """They have no text of their own."""
    parts = tokenizer("語", add_special_tokens=False)["input_ids"]
    recorder = DraftRecorder(MASK)
    recorder.add(torch.tensor([parts]))
    cells = draft_body(recorder.draft(0, 0, slice(None)), 1, TokenPieces(tokenizer, MASK))["cells"]
    assert [cell["text"] for cell in cells] == ["\ufffd"] * len(parts) and len(parts) > 1
    assert bytes(byte for cell in cells for byte in cell["bytes"]).decode() == "語"


def test_without_a_mask_token_the_first_step_changes_nothing():
    recorder = DraftRecorder(None)
    recorder.add(torch.tensor([[3, 4]]))
    assert recorder.draft(0, 0, slice(None)).before.tolist() == [3, 4]
    recorder.add(torch.tensor([[3, 5]]))
    assert recorder.draft(0, 0, slice(None)).before.tolist() == [3, 4]
    assert recorder.draft(0, 0, slice(None)).after.tolist() == [3, 5]


def test_nothing_is_recorded_where_nobody_asks(client, server, monkeypatch):
    def unwanted(*_):
        raise AssertionError("recorded")

    monkeypatch.setattr(DraftRecorder, "add", unwanted)
    options = {"model": NAME, "prompt": "The", "max_tokens": 8}
    assert client.completions.create(**options).choices and list(client.completions.create(**options, stream=True))
    with pytest.raises(openai.APIError, match="generation failed: AssertionError"):
        list(client.completions.create(**options, stream=True, extra_body={"stream_drafts": True}))


def test_a_batch_gives_drafts_only_to_those_who_asked(server, client, model):
    found, gathered = {}, threading.Event()

    def listen(name, **extra):
        options = {"model": NAME, "prompt": "The", "max_tokens": 8, "stream": True, "extra_body": extra}
        found[name] = list(client.completions.create(**options))

    batches = server.metric("xdlm_batch_rows_count")
    with held(model, gathered.is_set):
        threads = [threading.Thread(target=listen, args=("first",), kwargs={"steps": 2})]  # holds the engine
        threads[0].start()
        wait_until(lambda: server.metric("xdlm_running_rows") == 1)
        threads += [threading.Thread(target=listen, args=("with",), kwargs={"stream_drafts": True})]
        threads += [threading.Thread(target=listen, args=("without",))]
        for thread in threads[1:]:
            thread.start()
        wait_until(lambda: server.engine.queue_length == 2)
        gathered.set()
        for thread in threads:
            thread.join(PATIENCE)
    assert server.metric("xdlm_batch_rows_count") - batches == 2
    drafts = {name: sum("draft" in chunk.choices[0].model_extra for chunk in chunks) for name, chunks in found.items()}
    assert drafts == {"first": 0, "with": 8, "without": 0}
    texts = {name: "".join(chunk.choices[0].text for chunk in chunks) for name, chunks in found.items()}
    assert texts["with"] == texts["without"]


def test_a_client_that_reads_slowly_misses_the_oldest_drafts():
    """What waits for it is bounded; the last draft and the end are there."""

    async def scenario():
        job = Job(None, [], asyncio.get_running_loop())
        for step in range(1, 1001):
            job.post(Draft(0, step, None, None, None))
        job.post(Piece(0, "text", "stop"))
        job.post(Done())
        await asyncio.sleep(0)
        while job.events.qsize() < DRAFTS_KEPT + 2:
            await asyncio.sleep(0.01)
        received = [await job.next_event() for _ in range(job.events.qsize())]
        assert [event.step for event in received[:-2]] == list(range(1001 - DRAFTS_KEPT, 1001))
        assert received[-2:] == [Piece(0, "text", "stop"), Done()] and not job.drafts

    asyncio.run(scenario())


def test_a_client_that_leaves_ends_its_drafts(server, model):
    cancelled, steps = server.metric("xdlm_cancelled_total"), server.metric("xdlm_steps_total")
    body = {"model": NAME, "prompt": "The", "max_tokens": 128, "stream": True, "stream_drafts": True}
    request = urllib.request.Request(
        server.url + "/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    left = threading.Event()
    passes = iter(range(10**6))
    with held(model, lambda: left.is_set() or next(passes) < 3):
        answer = urllib.request.urlopen(request, timeout=PATIENCE)
        assert b'"draft": {"step": 1, "steps": 128' in answer.readline()
        answer.close()
        wait_until(lambda: server.metric("xdlm_cancelled_total") == cancelled + 1)
        left.set()
    wait_until(lambda: server.metric("xdlm_running_rows") == 0)
    assert server.metric("xdlm_steps_total") - steps < 10


def test_drafts_need_a_stream(server):
    for change in ({}, {"stream": False}):
        status, body = server.raw({"model": NAME, "prompt": "The", "stream_drafts": True} | change)
        assert status == 400 and body["error"]["message"] == "stream_drafts needs stream=true."
        assert body["error"]["param"] == "stream_drafts"
    assert server.raw({"model": NAME, "prompt": "The", "max_tokens": 8, "stream_drafts": False})[0] == 200
