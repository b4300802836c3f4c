"""Text before a suffix, and revisions, over HTTP."""

import threading

import pytest
import torch
from servers import NAME, PATIENCE, held, openai, wait_until

from xdlm_hf.serving.fields import MAX_SPANS

TEXT = "The quick brown fox jumps over the lazy dog."


def filled(model, tokenizer, prompt, suffix, length=8, **options):
    """What the model puts between two texts, as ids."""
    before = tokenizer(prompt)["input_ids"]
    after = tokenizer(suffix, add_special_tokens=False)["input_ids"]
    ids = torch.tensor([before + [0] * length + after])
    options = {"steps": length} | options
    output = model.generate(ids, holes=[(len(before), len(before) + length)], **options)
    assert output[0, len(before) + length :].tolist() == after
    return output[0, len(before) : len(before) + length].tolist()


def as_text(tokenizer, ids):
    ids = ids[: ids.index(tokenizer.eos_token_id)] if tokenizer.eos_token_id in ids else ids
    return tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize(
    "extra", [{}, {"mixing_ratio": 0.6, "steps": 4}, {"sampler": "ancestral", "steps": 4, "seed": 2}], ids=str
)
def test_suffix_is_what_the_model_fills_in_before_it(client, model, tokenizer, extra):
    prompt, suffix = "The quick", " jumps over the lazy dog"
    expected = filled(model, tokenizer, prompt, suffix, **extra)
    answer = client.completions.create(model=NAME, prompt=prompt, suffix=suffix, max_tokens=8, extra_body=extra)
    assert answer.choices[0].text == as_text(tokenizer, expected)
    around = len(tokenizer(prompt)["input_ids"]) + len(tokenizer(suffix, add_special_tokens=False)["input_ids"])
    assert answer.usage.prompt_tokens == around
    assert answer.choices[0].finish_reason == ("stop" if tokenizer.eos_token_id in expected else "length")
    # It depends on the suffix, so it is no continuation.
    other = client.completions.create(model=NAME, prompt=prompt, suffix="naïve", max_tokens=8, extra_body=extra)
    assert other.choices[0].text == as_text(tokenizer, filled(model, tokenizer, prompt, "naïve", **extra))


def test_several_prompts_before_one_suffix_are_padded(client, model, tokenizer):
    prompts = ["The", "The quick brown fox jumps"]
    answer = client.completions.create(model=NAME, prompt=prompts, suffix=" dog", max_tokens=8, n=2)
    texts = [as_text(tokenizer, filled(model, tokenizer, prompt, " dog")) for prompt in prompts]
    assert [choice.text for choice in answer.choices] == [texts[0], texts[0], texts[1], texts[1]]


def test_a_suffix_streams_with_drafts_of_the_hole_alone(client, model, tokenizer):
    options = {"model": NAME, "prompt": "The", "suffix": " dog", "max_tokens": 8, "stream": True}
    chunks = list(client.completions.create(**options, extra_body={"stream_drafts": True}))
    drafts = [chunk.choices[0].draft for chunk in chunks if "draft" in chunk.choices[0].model_extra]
    expected = filled(model, tokenizer, "The", " dog")
    assert len(drafts) == 8 and [cell["id"] for cell in drafts[-1]["cells"]] == expected
    assert "".join(chunk.choices[0].text for chunk in chunks) == as_text(tokenizer, expected)


def test_an_empty_suffix_is_none(client):
    options = {"model": NAME, "prompt": "The", "max_tokens": 8, "extra_body": {"block_length": 4}}
    plain = client.completions.create(**options)
    assert client.completions.create(suffix="", **options).choices[0].text == plain.choices[0].text


@pytest.mark.parametrize(
    "change, message, param",
    [
        ({"block_length": 8}, "block_length does not go with suffix", "block_length"),
        (
            {"response_format": {"type": "json_object"}},
            "response_format does not go with suffix: JSON is a whole answer; leave it out",
            "response_format",
        ),
        ({"suffix": 3}, "suffix=3 must be a string", "suffix"),
        ({"suffix": [" dog"]}, "suffix=[' dog'] must be a string", "suffix"),
        ({"steps": 17}, "steps=17 is more than max_new_tokens=16", None),
        ({"suffix": "x" * 4000}, "a suffix of at least ", "suffix"),
        ({"suffix": " dog", "prompt": [7] * 240}, "with 16 tokens for the answer and ", "prompt"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_refused_suffixes(server, change, message, param):
    body = {"model": NAME, "prompt": "The", "max_tokens": 16, "suffix": " lazy dog"}
    status, answer = server.raw(body | change)
    assert status == 400 and message in answer["error"]["message"] and answer["error"]["param"] == param


def test_chats_have_no_suffix(server):
    body = {"model": NAME, "messages": [{"role": "user", "content": "x"}], "suffix": "y"}
    status, answer = server.raw(body, "/v1/chat/completions")
    assert status == 400 and answer["error"]["message"] == (
        'suffix is not supported: fill-in-the-middle is a field of /v1/completions; leave it out or send "".'
    )


# ---------------------------------------------------------------------------------------------------------------------
# Revisions


def revise(server, **change):
    status, body = server.raw({"model": NAME, "text": TEXT} | change, "/v1/revise")
    assert status == 200, body
    return body


@pytest.mark.parametrize(
    "extra",
    [
        {"mixing_ratio": 0.6},
        {"mixing_ratio": 0.6, "editable": [[4, 9], [16, 19]], "steps": 3},
        {"mixing_ratio": 0.5, "temperature": 1.0, "seed": 3, "editable": [[0, 20]]},
        {"mixing_ratio": 0.0, "refinement": {"policy": "threshold", "threshold": 0.01, "max_edits_per_token": 1}},
    ],
    ids=str,
)
def test_a_revision_is_what_the_model_makes_of_the_text(server, model, tokenizer, extra):
    expected = model.revise(TEXT, tokenizer=tokenizer, **extra)
    body = revise(server, **extra)
    assert body["object"] == "text_revision" and body["model"] == NAME and body["id"].startswith("revise-")
    choice = {"index": 0, "text": expected, "logprobs": None, "finish_reason": "stop"}
    assert body["choices"] == [choice] and expected != TEXT
    encoding = tokenizer(TEXT, return_offsets_mapping=True, add_special_tokens=False)
    spans = extra.get("editable", [[0, len(TEXT)]])
    inside = sum(any(a <= i and j <= b for a, b in spans) for i, j in encoding["offset_mapping"])
    tokens = len(encoding["input_ids"])
    usage = {"prompt_tokens": tokens, "completion_tokens": inside, "total_tokens": tokens + inside}
    assert body["usage"] == usage and 0 < inside <= tokens


def test_what_is_outside_the_spans_stays(server):
    changed = [revise(server, mixing_ratio=0.9, editable=[[9, 15]], temperature=1.0, seed=i) for i in range(3)]
    for text in (body["choices"][0]["text"] for body in changed):
        assert text != TEXT and text.startswith(TEXT[:9]) and text.endswith(TEXT[15:])
    # Characters are code points, as in Python: this one is two units of UTF-16.
    text = "😀 The quick brown fox"
    body = revise(server, text=text, mixing_ratio=0.9, editable=[[11, 17]])
    assert body["choices"][0]["text"] != text and body["choices"][0]["text"].startswith(text[:11])


def test_revisions_share_batches_with_each_other_alone(server, client, model, tokenizer):
    texts = [TEXT, "A lazy fox.", "naïve 漢字 and the dog"]
    expected = {text: model.revise(text, tokenizer=tokenizer, mixing_ratio=0.6) for text in texts}
    found, gathered = {}, threading.Event()

    def ask(text):
        found[text] = revise(server, text=text, mixing_ratio=0.6)["choices"][0]["text"]

    def complete(name, **options):
        found[name] = client.completions.create(
            model=NAME, prompt="The", max_tokens=8, extra_body={"mixing_ratio": 0.6, "steps": 8}, **options
        )

    before = server.metric("xdlm_batch_rows_count")
    with held(model, gathered.is_set):
        threads = [threading.Thread(target=client.completions.create, kwargs={"model": NAME, "prompt": "A"})]
        threads[0].start()
        wait_until(lambda: server.metric("xdlm_running_rows") == 1)
        threads += [threading.Thread(target=ask, args=(text,)) for text in texts]
        threads += [threading.Thread(target=complete, args=("answer",))]
        threads += [threading.Thread(target=complete, args=("hole",), kwargs={"suffix": " dog"})]
        for thread in threads[1:]:
            thread.start()
        wait_until(lambda: server.engine.queue_length == 5)
        gathered.set()
        for thread in threads:
            thread.join(PATIENCE)
    assert server.metric("xdlm_batch_rows_count") - before == 4
    assert {text: found[text] for text in texts} == expected and {"answer", "hole"} < found.keys()


@pytest.mark.parametrize(
    "change, message, param",
    [
        ({"text": None}, "text is missing", "text"),
        ({"text": ""}, "text is empty", "text"),
        ({"text": ["The"]}, "text=['The'] must be a string", "text"),
        ({"text": "x" * 4000}, "a text of at least ", "text"),
        ({"text": "z, " * 130}, "a text of ", "text"),
        ({"editable": [[3, 99]]}, "editable holds (3, 99); a span needs 0 <= first < end <= 44, in", "editable"),
        ({"editable": []}, f"editable=[] must be a list of 1 to {MAX_SPANS} pairs [first, end]", "editable"),
        ({"editable": [[1, 2]] * (MAX_SPANS + 1)}, "must be a list of 1 to", "editable"),
        ({"editable": [[1, True]]}, "editable=[[1, True]] must be a list", "editable"),
        ({"editable": "quick"}, "editable='quick' must be a list", "editable"),
        ({"editable": [[5, 6]]}, "no token lies wholly inside the editable spans; widen them", "editable"),
        ({"mixing_ratio": 0}, "mixing_ratio=0 with refinement=None edits nothing; pass mixing_ratio, or", None),
        ({"steps": 129}, "steps=129 is above this server's 128", "steps"),
        ({"steps": 0}, "steps=0 must be a positive integer", "steps"),
        ({"stream": True}, "stream is not supported: a revision is final at its end only; leave it out or", "stream"),
        ({"n": 2}, "n is not supported: /v1/revise gives one revision; send several requests", "n"),
        ({"max_tokens": 8}, "'max_tokens' is not known; known are edit_threshold, editable", "max_tokens"),
        ({"polish_steps": 8}, "'polish_steps' is not known", "polish_steps"),
        ({"temperature": 3}, "temperature=3 must be a number from 0 to 2", "temperature"),
        ({"top_p": 0.5}, "top_k=None, top_p=0.5 need sampling", None),
    ],
    ids=lambda value: str(value)[:30],
)
def test_refused_revisions(server, change, message, param):
    body = {"model": NAME, "text": TEXT, "mixing_ratio": 0.5}
    status, answer = server.raw(body | change, "/v1/revise")
    assert status == 400 and message in answer["error"]["message"], answer
    assert answer["error"]["param"] == param and answer["error"]["type"] == "invalid_request_error"


def test_revisions_need_the_name_of_the_model(server, client):
    status, answer = server.raw({"model": "other", "text": TEXT}, "/v1/revise")
    assert status == 404 and answer["error"]["code"] == "model_not_found"
    with pytest.raises(openai.NotFoundError, match="model='other' is not served here"):
        client.completions.create(model="other", prompt="x", suffix="y")
