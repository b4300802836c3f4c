"""What a streamer is told while generate() runs, and the two that come with the package."""

import io

import pytest
import torch
from models import CHECKPOINT
from rich.console import Console
from transformers import AutoModelForCausalLM
from transformers.generation import (
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    TextStreamer,
)
from transformers.generation.streamers import BaseStreamer, TextDiffusionStreamer

from xdlm_hf.data.tokenizer import train_tokenizer
from xdlm_hf.watch.streamers import HistoryStreamer, LiveStreamer

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

    options = {"steps": 6, "max_new_tokens": 24, "block_length": 8, "pad_token_id": 7, "early_stop": False}
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


@pytest.mark.parametrize("sampler", ["confidence", "ancestral"])
def test_nan_does_not_end_the_stream(model, sampler):
    class Overflown(LogitsProcessor):
        def __call__(self, input_ids, scores):
            return torch.full_like(scores, torch.nan)

    spy, processors = Spy(), LogitsProcessorList([Overflown()])
    with pytest.raises(ValueError, match="some logits are NaN"):
        model.generate(**PROMPT, steps=4, max_new_tokens=8, sampler=sampler, logits_processor=processors, streamer=spy)
    assert spy.names == ["put"] + ["draft"] * (4 if sampler == "confidence" else 0)


class TakesLogits(Spy):
    _takes_logits = True


@pytest.mark.parametrize(
    "streamer, options, message",
    [
        (print, {}, r"streamer=<built-in function print> has no method put\(\)"),
        (type("OnlyPut", (), {"put": print})(), {}, r"has no method end\(\); pass a BaseStreamer"),
        (Spy(), {"reference_compat": True}, "reference_compat=True may edit the prompt.*leave out one"),
        (TakesLogits(), {}, "takes drafts as logits, but drafts are token ids"),
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


# ---------------------------------------------------------------------------------------------------------------------
# The two of this package


@pytest.mark.parametrize("k, sampler", [(0.0, "confidence"), (0.2, "confidence"), (0.0, "ancestral")])
def test_recorded_history_is_the_model_s_own(model, k, sampler):
    recorder = HistoryStreamer(MASK)
    options = {"steps": 6, "max_new_tokens": 24, "mixing_ratio": k, "sampler": sampler, "seed": 1}
    options |= {"block_length": 8} if sampler == "confidence" else {}
    plain = model.generate(**PROMPT, **options)
    options |= {"eos_token_id": int(plain[0, 8]), "pad_token_id": 7}  # ends early: padding is not part of a step
    for _ in range(2):  # a second generation starts afresh
        output = model.generate(
            **PROMPT, **options, streamer=recorder, return_dict_in_generate=True, output_history=True
        )
        assert torch.stack(recorder.history).equal(torch.stack(output.history))
        if sampler == "confidence":
            ours, own = torch.stack(recorder.confidences), torch.stack(output.confidences)
            torch.testing.assert_close(ours, own, equal_nan=True, rtol=0, atol=0)
        else:
            assert recorder.confidences == [] and output.confidences is None
        assert recorder.sequences.equal(output.sequences) and not recorder.sequences.equal(recorder.history[-1])
        assert recorder.prompt_length == 3 and recorder.steps == 6


def test_without_a_mask_token_history_begins_after_the_first_step(model):
    recorder = HistoryStreamer(None)
    options = {"steps": 4, "max_new_tokens": 8, "sampler": "ancestral", "mixing_ratio": 1.0, "seed": 0}
    output = model.generate(**PROMPT, **options, streamer=recorder, return_dict_in_generate=True, output_history=True)
    assert torch.stack(recorder.history).equal(torch.stack(output.history[1:])) and recorder.steps == 4


def drawn(tokenizer, width=80, height=24, terminal=True, **options):
    console = Console(
        file=io.StringIO(),
        width=width,
        height=height,
        force_terminal=terminal,
        color_system="standard" if terminal else None,
    )
    return LiveStreamer(tokenizer, MASK, console=console, **options)


def rendered(streamer):
    """A frame as the terminal would show it, with its colours."""
    console = Console(file=io.StringIO(), width=streamer.console.width, force_terminal=True, color_system="standard")
    console.print(streamer.frame())
    return console.file.getvalue()


def test_live_view_of_a_batch(model, tokenizer):
    streamer = drawn(tokenizer, steps=6)
    with streamer:
        model.generate(**PROMPT, steps=6, max_new_tokens=24, mixing_ratio=0.3, eos_token_id=[], streamer=streamer)
    output = streamer.console.file.getvalue()
    assert output.count("\033[?25l") == output.count("\033[?25h") == 1  # the cursor comes back
    assert "step 6/6:" in output and "\033[1;32m" in output and "\033[1;34m" in output and "▁" in output
    for row in range(2):
        assert f"[{row}] " in output and streamer.answer(row).split("\n")[0] in output.replace("\033[0m", "")


def test_frames_show_what_a_step_did(tokenizer):
    streamer = drawn(tokenizer, steps=2, max_rows=1)
    a, b = tokenizer("ab")["input_ids"]
    streamer.put(torch.tensor([[a], [a]]))
    streamer.put_draft(torch.tensor([[MASK, a, a], [MASK] * 3]))
    streamer.put_draft(torch.tensor([[b, b, MASK], [a] * 3]))
    frame = rendered(streamer)
    assert "\033[1;32mb\033[0m\033[1;34mb\033[0m\033[1;31m▁\033[0m" in frame
    assert "4 filled" in frame and "1 refined" in frame and "1 re-masked" in frame and "and 1 more" in frame
    streamer.abandon()


def test_long_text_is_shown_around_its_latest_change(tokenizer):
    streamer = drawn(tokenizer, width=20, height=8)
    a, b = tokenizer("ab")["input_ids"]
    streamer.put(torch.empty(1, 0, dtype=torch.long))
    before = torch.full((1, 400), a)
    after = before.clone()
    after[0, 300] = b
    streamer.put_draft(before)
    streamer.put_draft(after)
    frame = rendered(streamer)
    assert "b" in frame and len(frame.splitlines()) <= 8
    streamer.abandon()


def test_without_a_terminal_it_is_plain_text(model, tokenizer):
    streamer = drawn(tokenizer, terminal=False, steps=20)
    with streamer:
        model.generate(**PROMPT, steps=20, max_new_tokens=20, eos_token_id=[], streamer=streamer)
    output = streamer.console.file.getvalue()
    assert "\033" not in output
    reports = [line for line in output.splitlines() if line.startswith("step ")]
    assert len(reports) == 10 and reports[-1] == "step 20/20: 2 filled 0 refined 0 re-masked"
    assert "[1] " + streamer.answer(1).split("\n")[0] in output


def test_a_stopped_generation_gives_the_terminal_back(model, tokenizer):
    streamer = drawn(tokenizer)

    def stop(ids):
        raise KeyboardInterrupt

    streamer.frame = lambda: stop(None)
    with pytest.raises(KeyboardInterrupt), streamer:
        model.generate(**PROMPT, steps=4, max_new_tokens=8, streamer=streamer)
    output = streamer.console.file.getvalue()
    assert output.count("\033[?25l") == output.count("\033[?25h") == 1
    assert len(streamer.history) == 2 and streamer.sequences is None
    del streamer.frame
    with streamer:  # and the next one starts afresh
        model.generate(**PROMPT, steps=4, max_new_tokens=8, streamer=streamer)
    assert len(streamer.history) == 5 and streamer.sequences is not None


@pytest.mark.parametrize("options, message", [({"steps": 0}, "steps=0 must be"), ({"max_rows": 0}, "max_rows=0 must")])
def test_live_refusals(tokenizer, options, message):
    with pytest.raises(ValueError, match=message):
        LiveStreamer(tokenizer, MASK, **options)
