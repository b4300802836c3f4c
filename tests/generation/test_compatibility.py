"""What users of Transformers' `generate` and `pipeline` expect: sampling, lengths, stop strings, chats, streamers."""

import pytest
import torch
from models import model_of, save_checkpoint, small_model
from transformers import TextStreamer, pipeline
from transformers.generation import (
    EosTokenCriteria,
    ForcedEOSTokenLogitsProcessor,
    GenerationConfig,
    LogitsProcessorList,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    SequenceBiasLogitsProcessor,
    StoppingCriteriaList,
    StopStringCriteria,
    SuppressTokensLogitsProcessor,
)

from xdlm_hf import XDLMGenerationConfig
from xdlm_hf.data.tokenizer import train_tokenizer
from xdlm_hf.generation.compatibility import StopStrings
from xdlm_hf.generation.resolution import draws_with, resolve


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["The capital of France is Paris, é and ü. def fibonacci(n): return n"] * 3, vocab_size=290)


@pytest.fixture(scope="module")
def model(tokenizer):
    return model_of(tokenizer)


@pytest.fixture(scope="module")
def pipe(tokenizer, model, tmp_path_factory):
    folder = str(save_checkpoint(tmp_path_factory.mktemp("checkpoint"), model, tokenizer))
    return pipeline("text-generation", model=folder, tokenizer=folder)


def new_text(model, tokenizer, prompt, **options):
    inputs = prompt if isinstance(prompt, dict) else tokenizer(prompt, return_tensors="pt")
    sequences = model.generate(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], **options)
    return tokenizer.decode(sequences[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


PROMPTS = ["The capital", "def fib"]


def test_pipeline_continues_texts_alone_and_in_batches(pipe, model, tokenizer):
    options = {"do_sample": False, "max_new_tokens": 6, "steps": 3}
    expected = [new_text(model, tokenizer, prompt, **options) for prompt in PROMPTS]
    assert len(set(expected)) == 2
    for batch_size in (1, 2):
        answers = pipe(PROMPTS, batch_size=batch_size, **options)
        assert [answer[0]["generated_text"] for answer in answers] == [
            prompt + text for prompt, text in zip(PROMPTS, expected, strict=True)
        ]
    assert pipe(PROMPTS[0], return_full_text=False, **options) == [{"generated_text": expected[0]}]
    assert len(pipe(PROMPTS[0], num_return_sequences=2, **options)) == 2
    assert pipe("", return_full_text=False, **options)[0]["generated_text"] == tokenizer.decode(
        model.generate(**options)[0], skip_special_tokens=True
    )


def test_pipeline_draws_at_its_own_temperature(pipe, model, tokenizer):
    # Its defaults, as its documentation says: do_sample=True and temperature=0.7, unless the checkpoint stores others.
    torch.manual_seed(0)
    drawn = pipe(PROMPTS[0], return_full_text=False, max_new_tokens=6)[0]["generated_text"]
    torch.manual_seed(0)
    assert drawn == new_text(model, tokenizer, PROMPTS[0], temperature=0.7, max_new_tokens=6)
    pipe.model.generation_config = XDLMGenerationConfig(do_sample=False)
    try:
        stored = pipe(PROMPTS[0], return_full_text=False, max_new_tokens=6)[0]["generated_text"]
    finally:
        pipe.model.generation_config = XDLMGenerationConfig()
    assert stored == new_text(model, tokenizer, PROMPTS[0], max_new_tokens=6)


def test_pipeline_answers_chats_by_the_chat_template(pipe, model, tokenizer):
    messages = [{"role": "user", "content": "capital?"}]
    options = {"do_sample": False, "max_new_tokens": 6}
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    expected = new_text(model, tokenizer, dict(prompt), **options)
    answer = {"role": "assistant", "content": expected}
    assert pipe(messages, **options) == [{"generated_text": [*messages, answer]}]
    assert [chat[0]["generated_text"][-1] for chat in pipe([messages, messages], batch_size=2, **options)] == [
        answer
    ] * 2


@pytest.mark.parametrize(
    "call, stored, temperature",
    [
        ({}, {}, 0.0),
        ({"do_sample": True}, {}, 1.0),
        ({"do_sample": False}, {}, 0.0),
        ({"do_sample": True, "temperature": 0.5}, {}, 0.5),
        ({"do_sample": False, "temperature": 0.0}, {}, 0.0),
        ({"do_sample": True}, {"temperature": 0.5}, 0.5),
        ({"do_sample": True}, {"temperature": 0.0}, 1.0),
        ({"do_sample": False}, {"temperature": 0.5, "top_k": 3}, 0.0),
        ({"temperature": 0.5}, {"do_sample": False}, 0.5),
        ({"temperature": 0.0}, {"do_sample": True}, 0.0),
        ({}, {"do_sample": True}, 1.0),
        ({}, {"do_sample": False}, 0.0),
        ({"sampler": "ancestral"}, {"do_sample": False}, 1.0),
        ({"sampler": "ancestral", "do_sample": True}, {}, 1.0),
        ({"do_sample": None}, {"do_sample": True}, 0.0),
    ],
)
def test_do_sample_sets_the_temperature(call, stored, temperature):
    model = small_model()
    model.generation_config = XDLMGenerationConfig(**stored)
    assert resolve(model, None, call).temperature == temperature
    if "do_sample" not in call:  # evaluation and server turn it into a temperature before
        assert draws_with(model.generation_config, call) == (temperature > 0)


def test_max_length_counts_the_prompt():
    model, ids = small_model(), torch.tensor([[1, 2, 3]])
    answer = model.generate(ids, max_length=10)
    assert answer.equal(model.generate(ids, max_new_tokens=7)) and answer.shape == (1, 10)
    model.generation_config = XDLMGenerationConfig(max_new_tokens=4)
    assert model.generate(ids, max_length=10).shape == (1, 10)
    assert model.generate(ids, XDLMGenerationConfig(max_length=12)).shape == (1, 12)
    assert model.generate(ids, XDLMGenerationConfig(max_length=12), max_new_tokens=5).shape == (1, 8)
    assert model.generate(max_length=10).shape == (1, 10)


def test_a_generation_config_of_transformers_is_read():
    model, ids = small_model(), torch.tensor([[1, 2]])
    given = GenerationConfig(max_new_tokens=5, do_sample=True, temperature=0.5, eos_token_id=3)
    options = resolve(model, given, {})
    assert (options.max_new_tokens, options.temperature, options.eos_token_id) == (5, 0.5, 3)
    assert model.generate(ids, GenerationConfig(max_new_tokens=5)).shape == (1, 7)


def cut(tokenizer, ids, stops):
    """Index of the first token with which the text holds a stop string, or None."""
    for n in range(len(ids)):
        if any(stop.encode() in tokens_bytes(tokenizer, ids[: n + 1]) for stop in stops):
            return n
    return None


def tokens_bytes(tokenizer, ids):
    decoded = StopStringCriteria._byte_level_decoder()
    return b"".join(
        bytes(decoded[c] for c in token) if all(c in decoded for c in token) else token.encode()
        for token in tokenizer.convert_ids_to_tokens(ids)
    )


def test_stop_strings_are_found_where_the_bytes_have_them(tokenizer, model):
    class Settings:
        stop_strings, pad_token_id = ["is P", "é", "ibo"], 1

    stops = StopStrings(Settings, tokenizer)
    generator = torch.Generator().manual_seed(0)
    texts = ["The capital of France is Paris", "def fibonacci(n): é", "caf", "is Pé is", "ibibo"]
    rows = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    rows += [torch.randint(len(tokenizer) + 9, (40,), generator=generator).tolist()]  # with ids that are no tokens
    for row in rows:
        found = stops.complete_at(torch.tensor([row]))[0].nonzero().flatten().tolist()
        assert (found[0] if found else None) == cut(
            tokenizer, [i for i in row if i < len(tokenizer)], Settings.stop_strings
        )
    assert stops.complete_at(torch.tensor([rows[0]])).any() and not stops.complete_at(torch.tensor([rows[2]])).any()


@pytest.mark.parametrize("options", [{"block_length": 1}, {}, {"mixing_ratio": 0.3}, {"sampler": "ancestral"}], ids=str)
def test_an_answer_ends_with_its_stop_string(tokenizer, model, options):
    inputs = tokenizer(PROMPTS, return_tensors="pt", padding=True, padding_side="left")
    options = {"max_new_tokens": 16, "seed": 0, "eos_token_id": [], "return_dict_in_generate": True, **options}
    plain = model.generate(**inputs, **options)
    start = inputs["input_ids"].shape[1]
    # The text of a token inside the first row's answer, which other rows need not have.
    tokens = [tokenizer.decode(i) for i in plain.sequences[0, start:].tolist()]
    stop = next(t for t in tokens[3:] if t.isascii() and t.isprintable() and t.strip())
    stopped = model.generate(**inputs, **options, stop_strings=stop, tokenizer=tokenizer)
    for before, after in zip(plain.sequences[:, start:].tolist(), stopped.sequences[:, start:].tolist(), strict=True):
        end = cut(tokenizer, before, [stop])
        kept = len(before) if end is None else end + 1
        assert after == before[:kept] + [model.config.pad_token_id] * (len(before) - kept)
    first = cut(tokenizer, plain.sequences[0, start:].tolist(), [stop])
    if options.get("block_length") == 1:  # one token a pass, and none after the end
        assert stopped.row_forward_passes[0] == first + 1 < plain.row_forward_passes[0] == 16


def test_pipeline_stops_at_a_stop_sequence(pipe, model, tokenizer):
    options = {"do_sample": False, "max_new_tokens": 8, "return_full_text": False}
    text = pipe(PROMPTS[0], **options)[0]["generated_text"]
    stop = next(c for c in text if c.isascii() and c.isprintable())
    stopped = pipe(PROMPTS[0], stop_sequence=stop, **options)[0]["generated_text"]
    assert stop in stopped and text.startswith(stopped)


def test_processors_that_read_from_left_to_right_are_refused():
    model = small_model()

    def run(*processors):
        return model.generate(steps=2, max_new_tokens=4, logits_processor=LogitsProcessorList(processors))

    class Own(NoRepeatNGramLogitsProcessor):
        pass

    for processor in (NoRepeatNGramLogitsProcessor(2), ForcedEOSTokenLogitsProcessor(4, 21, "cpu"), Own(2)):
        with pytest.raises(ValueError, match=f"processor {type(processor).__name__} reads the text from left to right"):
            run(processor)
    for processor in (SequenceBiasLogitsProcessor([[[3, 4], -5.0]]), NoBadWordsLogitsProcessor([[3, 4]])):
        with pytest.raises(ValueError, match="from left to right for sequences of several tokens"):
            run(processor)
    with pytest.raises(ValueError, match="NoRepeatNGramLogitsProcessor reads"):
        model.revise(torch.tensor([[1, 2]]), logits_processor=[NoRepeatNGramLogitsProcessor(2)], mixing_ratio=0.5)
    most = int(run()[0, 0])
    for processor in (NoBadWordsLogitsProcessor([[most]]), SuppressTokensLogitsProcessor([most])):
        assert most in run()[0] and most not in run(processor)[0]


def test_criteria_that_read_the_last_token_are_refused(tokenizer):
    for criterion, remedy in (
        (EosTokenCriteria(3), "EosTokenCriteria reads the last token.*pass eos_token_id="),
        (StopStringCriteria(tokenizer, "a"), "StopStringCriteria reads the last token.*pass stop_strings=... and tok"),
    ):
        with pytest.raises(ValueError, match=remedy):
            small_model().generate(max_new_tokens=4, stopping_criteria=StoppingCriteriaList([criterion]))


@pytest.mark.parametrize("name", ["assistant", "temperature", "seed", "stop_strings", "sampler", "cache", "streamer"])
def test_no_message_holds_a_tokenizer(tokenizer, name):
    with pytest.raises(ValueError, match="Tokenizer") as error:
        small_model().generate(**{"max_new_tokens": 8, name: tokenizer})
    assert len(str(error.value)) < 800 and "AddedToken" not in str(error.value)


def test_text_streamer_prints_the_answer_without_padding(model, tokenizer, capsys):
    inputs = tokenizer(PROMPTS[0], return_tensors="pt")
    options = {"max_new_tokens": 12, "block_length": 3}
    answer = model.generate(**inputs, **options)[0, inputs["input_ids"].shape[1] :].tolist()
    end_id = answer[4]
    stop = next(t for t in map(tokenizer.decode, answer[3:]) if t.isascii() and t.isprintable() and t.strip())
    ends = [len(answer), cut(tokenizer, answer, [stop]) + 1, answer.index(end_id) + 1]
    extras = [{"eos_token_id": []}, {"stop_strings": [stop], "tokenizer": tokenizer}, {"eos_token_id": end_id}]
    for extra, end in zip(extras, ends, strict=True):
        capsys.readouterr()
        model.generate(**inputs, **options, **extra, streamer=TextStreamer(tokenizer, skip_prompt=True))
        assert capsys.readouterr().out == tokenizer.decode(answer[:end]) + "\n"
    with pytest.raises(ValueError, match="TextStreamer only supports batch size 1"):
        both = tokenizer(PROMPTS, return_tensors="pt", padding=True)
        model.generate(**both, **options, streamer=TextStreamer(tokenizer))
