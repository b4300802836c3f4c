"""What a streamer is told while generate() runs, and the two that come with the package."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.generation import StoppingCriteria, StoppingCriteriaList, TextStreamer
from transformers.generation.streamers import BaseStreamer, TextDiffusionStreamer

from xdlm_hf.data import train_tokenizer

CHECKPOINT = Path(__file__).parent / "fixtures" / "tiny-llada"
MASK, EOS = 510, 500
PROMPT = {
    "input_ids": torch.tensor([[EOS, 37, 204], [390, 361, 424]]),
    "attention_mask": torch.tensor([[0, 1, 1], [1, 1, 1]]),
}


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer():
    # 512 rows, as the checkpoint has; its mask token is another, which a draft shows as an ordinary token.
    return train_tokenizer(["Streams of text, drafted and refined. " * 3, "naïve 漢字 \U0001f600"], vocab_size=512)


class Spy(BaseStreamer):
    """Keeps the calls, in order."""

    def __init__(self):
        self.calls = []

    def put(self, value):
        self.calls.append(("put", value))

    def put_draft(self, value):
        self.calls.append(("draft", value))

    def end(self):
        self.calls.append(("end", None))

    @property
    def names(self):
        return [name for name, _ in self.calls]

    @property
    def puts(self):
        return [value for name, value in self.calls if name == "put"]


# ---------------------------------------------------------------------------------------------------------------------
# What generate() tells


@pytest.mark.parametrize("sampler", ["confidence", "ancestral"])
def test_everything_is_put_once_and_drafts_are_the_history(model, sampler):
    spy = Spy()
    options = {"steps": 6, "max_new_tokens": 24, "mixing_ratio": 0.2, "sampler": sampler, "seed": 0}
    output = model.generate(**PROMPT, **options, streamer=spy, return_dict_in_generate=True, output_history=True)
    assert spy.names == ["put"] + ["draft"] * 6 + ["put", "end"]
    assert spy.calls[0][1].equal(PROMPT["input_ids"])
    assert torch.cat(spy.puts, 1).equal(output.sequences)
    drafts = [value for name, value in spy.calls if name == "draft"]
    assert all(draft.equal(state[:, 3:]) for draft, state in zip(drafts, output.history[1:], strict=True))
    if sampler == "confidence":
        assert [(draft == MASK).sum(-1).tolist() for draft in drafts] == [[20 - 4 * i] * 2 for i in range(6)]


def test_at_k_0_blocks_are_put_as_they_end(model):
    spy = Spy()
    output = model.generate(**PROMPT, steps=6, max_new_tokens=24, block_length=8, streamer=spy)
    assert spy.names == ["put"] + ["draft", "draft", "put"] * 3 + ["end"]
    widths = [value.shape[1] for _, value in spy.calls[1:-1]]
    assert widths == [24, 24, 8, 16, 16, 8, 8, 8, 8]
    assert torch.cat(spy.puts, 1).equal(output)


def test_refinement_reaches_back_so_blocks_wait(model):
    spy = Spy()
    model.generate(**PROMPT, steps=6, max_new_tokens=24, block_length=8, mixing_ratio=0.3, streamer=spy)
    assert spy.names == ["put"] + ["draft"] * 6 + ["put", "end"]


def test_padding_is_put_and_early_ends_too(model):
    class FirstRowThenAll(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return torch.tensor([True, input_ids.shape[1] > 3 + 8])

    options = {"steps": 6, "max_new_tokens": 24, "block_length": 8, "pad_token_id": 7}
    plain = model.generate(**PROMPT, **options)
    eos = int(plain[1, 3 + 2])  # the third token of the second answer ends it
    spy = Spy()
    criteria = StoppingCriteriaList([FirstRowThenAll()])
    output = model.generate(**PROMPT, **options, eos_token_id=eos, stopping_criteria=criteria, streamer=spy)
    assert [value.shape[1] for value in spy.puts] == [3, 8, 8, 8]  # the last one is padding: nothing was generated
    assert torch.cat(spy.puts, 1).equal(output)
    assert spy.names[-2:] == ["put", "end"]
    assert (output[0, 11:] == 7).all() and (output[1, 6:] == 7).all()


def test_without_put_draft_only_finished_text_is_put(model):
    class Plain:
        def __init__(self):
            self.calls = []

        def put(self, value):
            self.calls.append(value)

        def end(self):
            self.calls.append("end")

    streamer = Plain()
    output = model.generate(**PROMPT, steps=4, max_new_tokens=8, streamer=streamer)
    assert torch.cat(streamer.calls[:-1], 1).equal(output) and streamer.calls[-1] == "end"


def test_no_prompt_is_put_as_an_empty_one(model):
    spy = Spy()
    model.generate(steps=2, max_new_tokens=8, streamer=spy)
    assert spy.calls[0][1].shape == (1, 0)


def test_an_exception_does_not_end_the_stream(model):
    class Failing(Spy):
        def put_draft(self, value):
            super().put_draft(value)
            raise InterruptedError("enough")

    failing = Failing()
    with pytest.raises(InterruptedError, match="enough"):
        model.generate(**PROMPT, steps=4, max_new_tokens=8, streamer=failing)
    assert failing.names == ["put", "draft"]


class TakesLogits(Spy):
    _takes_logits = True


@pytest.mark.parametrize(
    "streamer, options, message",
    [
        (print, {}, r"streamer=<built-in function print> has no method put\(\)"),
        (type("OnlyPut", (), {"put": print})(), {}, r"has no method end\(\); pass a BaseStreamer"),
        (Spy(), {"reference_compat": True}, "reference_compat=True may edit the prompt.*leave out one"),
        (TakesLogits(), {}, "wants the drafts as logits; here drafts are token ids"),
    ],
)
def test_refusals(model, streamer, options, message):
    with pytest.raises(ValueError, match=message):
        model.generate(**PROMPT, steps=2, max_new_tokens=8, streamer=streamer, **options)
    assert not getattr(streamer, "calls", [])


@pytest.mark.parametrize("cls", [TextStreamer, TextDiffusionStreamer])
@pytest.mark.parametrize("k", [0.0, 0.2])
def test_the_streamers_of_transformers_print_one_answer(model, tokenizer, capsys, cls, k):
    one = {"input_ids": PROMPT["input_ids"][1:]}
    options = {"steps": 6, "max_new_tokens": 24, "block_length": 8, "mixing_ratio": k, "eos_token_id": []}
    sequences = model.generate(**one, **options, streamer=cls(tokenizer, skip_prompt=True))
    printed = capsys.readouterr().out.rsplit("\033[J", 1)[-1] if k else capsys.readouterr().out
    answer = tokenizer.decode(sequences[0, 3:])
    if cls is TextStreamer or k:
        assert printed.rstrip("\n") == answer.rstrip("\n")
    else:  # drafts stand between the blocks
        assert printed.count("\0337") == 6
    with pytest.raises(ValueError, match="batch size 1"):
        model.generate(**PROMPT, **options, streamer=cls(tokenizer))
