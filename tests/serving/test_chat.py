"""xdlm-chat: its commands, and the whole program in a terminal of its own, Ctrl-C included."""

import contextlib
import io
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time
import traceback
from pathlib import Path

import pytest
import torch
from models import model_of, save_checkpoint
from rich.console import Console

from xdlm_hf import LLaDAForDiffusionLM
from xdlm_hf.data.tokenizer import train_tokenizer
from xdlm_hf.loading import end_ids, end_of_turn_ids, load
from xdlm_hf.serving.chat import INTERRUPTED, TERMINATED, Chat, main


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A tiny chat model of random weights."""
    tokenizer = train_tokenizer(["The quick brown fox jumps over the lazy dog."] * 4, vocab_size=300)
    model = model_of(tokenizer)
    return save_checkpoint(tmp_path_factory.mktemp("chat"), model, tokenizer)


@pytest.fixture
def loaded(checkpoint):
    return load(str(checkpoint), device="cpu")


def talk(loaded, *lines, monkeypatch, **settings):
    """A chat fed with lines: it, its exit status, and what it printed."""
    console = Console(file=io.StringIO(), width=100, force_terminal=False)
    chat = Chat(*loaded, {"max_new_tokens": 16, "steps": 4, **settings}, console)
    given = iter(lines)

    def read(prompt):
        try:
            line = next(given)
        except StopIteration:
            raise EOFError from None
        if isinstance(line, type):
            raise line
        return line

    monkeypatch.setattr("builtins.input", read)
    return chat, chat.run(), console.file.getvalue()


def test_the_conversation_goes_through_the_template(loaded, monkeypatch):
    model, tokenizer = loaded
    prompts, original = [], model.generate
    monkeypatch.setattr(model, "generate", lambda **kw: (prompts.append(kw["input_ids"]), original(**kw))[1])
    chat, status, _ = talk(loaded, "Who jumps?", "", "And then?", monkeypatch=monkeypatch)
    assert status == 0 and [message["role"] for message in chat.messages] == ["user", "assistant"] * 2
    for prompt, turns in zip(prompts, (1, 3), strict=True):
        expected = tokenizer.apply_chat_template(chat.messages[:turns], tokenize=False, add_generation_prompt=True)
        assert tokenizer.decode(prompt[0]) == expected
    # The answer ends where the template says that a message does.
    assert end_of_turn_ids(tokenizer) == {tokenizer.convert_tokens_to_ids("<|eot_id|>")}
    assert end_ids(model, tokenizer) == {tokenizer.eos_token_id}


def test_a_base_model_continues_the_text(loaded, monkeypatch):
    model, tokenizer = loaded
    monkeypatch.setattr(tokenizer, "chat_template", None)
    prompts, original = [], model.generate
    monkeypatch.setattr(model, "generate", lambda **kw: (prompts.append(kw["input_ids"]), original(**kw))[1])
    chat, _, printed = talk(loaded, "The quick", "fox", monkeypatch=monkeypatch)
    assert "no chat template, so this is a base model" in printed
    assert prompts[1][0].tolist() == tokenizer("The quick\n" + chat.messages[1]["content"] + "\nfox")["input_ids"]


def test_settings(loaded, monkeypatch):
    lines = [
        "/k 0.2",
        "/length 24",
        "/steps 3",
        "/block 7",
        "/block 8",
        "/steps 6",
        "/temperature",
        "/k",
        "/k default",
        "/k",
    ]
    chat, _, printed = talk(loaded, *lines, monkeypatch=monkeypatch)
    assert chat.settings == {"max_new_tokens": 24, "steps": 6, "block_length": 8}
    assert "Before the next answer: steps=3 is too few for the 4 blocks of 7 tokens" in " ".join(printed.split())
    shown = [line for line in printed.splitlines() if "mixing_ratio" in line]
    assert shown == ["mixing_ratio = 0.2"] * 2 + ["mixing_ratio = default"] * 2


@pytest.mark.parametrize(
    "line, message",
    [
        ("/stepz 3", "there is no command /stepz; /help lists them."),
        ("/steps many", "/steps many: not a number; /steps takes one, or `default`."),
        ("/steps 0", "steps=0 must be a positive integer."),
        ("/k 2", "mixing_ratio=2.0 must lie in [0, 1]"),
        ("/save", "/save needs a file name"),
        ("/save x.html", "there is no answer to save yet"),
        ("caf\udce9", "this line holds bytes that are not UTF-8; enter it again without them."),
        ("word " * 600, "do not fit the model's 512; shorten it, or the answer with /length."),
    ],
)
def test_what_cannot_be_done_is_said_and_the_chat_goes_on(loaded, monkeypatch, line, message):
    chat, status, printed = talk(loaded, line, "Hello", monkeypatch=monkeypatch)
    assert message in " ".join(printed.split()) and status == 0 and len(chat.messages) == 2


def test_a_short_model_leaves_room_for_the_question(checkpoint, monkeypatch):
    model, tokenizer = load(str(checkpoint), device="cpu")
    assert model.config.max_sequence_length == 512
    for limit, expected in ((512, 128), (90, 45)):
        model.config.max_sequence_length = limit
        chat, status, printed = talk((model, tokenizer), "/length default", "Hi", monkeypatch=monkeypatch)
        assert len(chat.messages) == 2, printed
        assert chat._length == expected
    model.generation_config.max_new_tokens = 7
    assert Chat(model, tokenizer, {}, None)._length == 7


def test_a_message_too_long_is_tokenized_once(loaded, monkeypatch):
    """And not once for every turn before it."""
    counted, encode = [], Chat._encode
    monkeypatch.setattr(Chat, "_encode", lambda self, messages: (counted.append(messages), encode(self, messages))[1])
    _, _, printed = talk(loaded, "Hello", "Hello", "word " * 600, monkeypatch=monkeypatch)
    assert "do not fit the model's 512" in printed
    assert sum("word" in messages[-1]["content"] for messages in counted) == 1


def piped(checkpoint, monkeypatch, given, *arguments):
    """Status of the program with this standard input."""
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(given), encoding="utf-8"))
    with pytest.raises(SystemExit) as end:
        main(["--model", str(checkpoint), "--device", "cpu", *arguments])
    return end.value.code


def test_input_that_is_not_utf8_does_not_end_the_chat(checkpoint, monkeypatch, capsys):
    assert piped(checkpoint, monkeypatch, b"\xff\n/history\n") == 1
    printed = capsys.readouterr()
    assert "this line holds bytes that are not UTF-8" in printed.err and "Nothing was said yet." in printed.err
    assert printed.out == ""


def test_piped_input_prints_the_answers_alone(checkpoint, loaded, monkeypatch, capsys, tmp_path):
    chat, *_ = talk(loaded, "Who jumps?", "And then?", monkeypatch=monkeypatch)
    monkeypatch.undo()
    capsys.readouterr()
    page, given = tmp_path / "t.html", "Who jumps?\n\n/steps 4\nAnd then?\n/save {}\n"
    arguments = ["--max_new_tokens", "16", "--steps", "4"]
    assert piped(checkpoint, monkeypatch, given.format(page).encode(), *arguments) == 0
    printed = capsys.readouterr()
    assert printed.out == "".join(message["content"] + "\n" for message in chat.messages[1::2]) and page.exists()
    assert "\x1b" not in printed.err and "step 1/4" not in printed.err and "Written to" in printed.err


def test_a_piped_line_too_long_is_an_error_and_the_rest_is_answered(checkpoint, monkeypatch, capsys):
    given = ("word " * 600 + "\nHello\n").encode()
    assert piped(checkpoint, monkeypatch, given, "--max_new_tokens", "16", "--steps", "4") == 1
    printed = capsys.readouterr()
    assert "do not fit the model's 512" in " ".join(printed.err.split()) and printed.out.endswith("\n")


def test_text_that_looks_like_markup_is_printed_as_it_is(loaded, monkeypatch):
    _, _, printed = talk(loaded, "[bold]:smile:[/bold]", "/history", monkeypatch=monkeypatch)
    assert "user: [bold]:smile:[/bold]\n" in printed


def test_history_clear_and_save(loaded, monkeypatch, tmp_path):
    page = tmp_path / "trace.html"
    lines = ["/history", "Hello", "/history", f"/save {page}", "/save /nowhere/at/all.html", "/clear", "/history"]
    chat, status, printed = talk(loaded, *lines, monkeypatch=monkeypatch)
    assert status == 0 and not chat.messages
    assert printed.count("Nothing was said yet.") == 2 and "user: Hello\n" in printed
    assert "No such file or directory" in printed and page.read_text().startswith("<!DOCTYPE html>")


def test_old_turns_make_room(loaded, monkeypatch):
    long = "The quick brown fox jumps over the lazy dog. " * 4
    chat, _, printed = talk(loaded, *[long] * 8, "/length 200", "Hello", monkeypatch=monkeypatch)
    assert "turns no longer fit and are left out." in printed and len(chat.messages) == 18


@pytest.mark.parametrize("lines, status", [(["/quit", "never"], 0), ([], 0), ([KeyboardInterrupt], INTERRUPTED)])
def test_ways_to_leave(loaded, monkeypatch, lines, status):
    assert talk(loaded, *lines, monkeypatch=monkeypatch)[1] == status


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--model", "/nowhere/at/all"], "model='/nowhere/at/all' cannot be read as a folder or Hub name"),
        (["--model", "{}", "--device", "abacus"], "device='abacus' is not known to PyTorch"),
        (["--model", "{}", "--mixing_ratio", "2"], r"mixing_ratio=2.0 must lie in \[0, 1\]"),
    ],
)
def test_command_line_refusals(checkpoint, arguments, message):
    with pytest.raises(SystemExit, match="xdlm-chat: " + message):
        main([argument.format(checkpoint) for argument in arguments])


# ---------------------------------------------------------------------------------------------------------------------
# The program in a terminal


PATIENCE = 120  # seconds before something is taken for lost; no verdict depends on what happens sooner


class Terminal:
    """`xdlm-chat` in a pseudo-terminal: a fork of this process, which saves the seconds that importing takes.

    Args:
        held: For some forward passes, by number, how many signals must have come before they go on. The program writes
            `<held>` when it waits, and `<signal 1>` and so on as they come, since two at once are one to it.
    """

    def __init__(self, checkpoint, *arguments, held):
        self.pid, self.master = pty.fork()
        if self.pid == 0:
            self._run(["--model", str(checkpoint), "--device", "cpu", *arguments], held)
        self.before = termios.tcgetattr(self.master)
        self.status = None
        self.shown, self.position = "", 0

    def _run(self, arguments, held):
        """The child's whole life."""
        status = 1
        torch.set_num_threads(1)  # a fork has none of its parent's threads, and would wait for them
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts background jobs with it ignored
        signals, writing = os.pipe()
        passes = came = 0

        def wait_for_signals(*_):
            nonlocal passes, came
            passes += 1
            if passes in held:
                os.write(1, b"<held>")
            while came < held.get(passes, 0):
                os.read(signals, 1)
                came += 1
                os.write(1, f"<signal {came}>".encode())

        try:
            sys.stdin, sys.stdout = open(0), open(1, "w", buffering=1)  # not those that pytest captures
            sys.stderr = sys.stdout
            os.environ |= {"TERM": "xterm", "COLUMNS": "100", "LINES": "30"}
            os.set_blocking(writing, False)
            signal.set_wakeup_fd(writing)
            torch.nn.modules.module.register_module_forward_pre_hook(
                lambda module, args: wait_for_signals() if isinstance(module, LLaDAForDiffusionLM) else None
            )
            main(arguments)
        except SystemExit as end:
            status = end.code
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(status)

    def read_until(self, text):
        """What is shown up to `text`, from behind what the last call found."""
        end = time.monotonic() + PATIENCE
        while (found := self.shown.find(text, self.position)) < 0:
            assert time.monotonic() < end, f"{text!r} never came; {self.state()}; last shown: {self.shown[-300:]!r}"
            if select.select([self.master], [], [], 0.1)[0]:
                try:
                    self.shown += os.read(self.master, 1 << 16).decode(errors="replace")
                except OSError as error:
                    raise AssertionError(f"ended before {text!r} came: {self.shown[-500:]!r}") from error
        start, self.position = self.position, found + len(text)
        return self.shown[start : self.position]

    def wait_for_rest(self):
        """Until the program waits without a time limit, such as for the next letter of a line.

        After a letter readline waits 0.1 s for more of them, and forgets a signal that comes in that time.
        """
        end = time.monotonic() + PATIENCE
        before = None
        while (now := self.scheduling()) != before or "S" not in now[0]:
            assert time.monotonic() < end, f"never at rest: {now}"
            before = now
            time.sleep(0.3)

    def state(self):
        """What the process waits for, for a message."""
        status = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        lines = [line for line in status if line.startswith(("State", "Sig", "Shd", "voluntary"))]
        return " ".join([*lines, Path(f"/proc/{self.pid}/syscall").read_text()])

    def scheduling(self):
        """State of the process, and how often it has gone to sleep."""
        status = dict(line.split(":", 1) for line in Path(f"/proc/{self.pid}/status").read_text().splitlines())
        return status["State"], status["voluntary_ctxt_switches"]

    def send(self, text):
        os.write(self.master, text.encode())

    def wait(self):
        """Exit status; the rest of the output is read, so that the program can write it."""
        end = time.monotonic() + PATIENCE
        while (ended := os.waitpid(self.pid, os.WNOHANG))[0] == 0:
            assert time.monotonic() < end, f"still running: {self.shown[-500:]!r}"
            with contextlib.suppress(OSError):  # the other end is closed
                if select.select([self.master], [], [], 0.1)[0]:
                    self.shown += os.read(self.master, 1 << 16).decode(errors="replace")
        self.status = os.waitstatus_to_exitcode(ended[1])
        return self.status

    def close(self):
        if self.status is None:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        os.close(self.master)


@pytest.fixture
def terminal(checkpoint):
    opened = []

    def start(*arguments, **options):
        opened.append(Terminal(checkpoint, *arguments, **options))
        return opened[-1]

    yield start
    for one in opened:
        one.close()


def cursor_is_back(shown):
    """Whether the last word about the cursor is to show it."""
    return re.findall(r"\x1b\[\?25([hl])", shown)[-1:] in ([], ["h"])


READY = "\x1b[?2004h> "  # readline asks for brackets around pasted text, and shows the prompt


def test_a_paste_of_several_lines_is_one_message(terminal):
    session = terminal("--max_new_tokens", "8", "--steps", "2", held={3: 1})
    session.read_until(READY)
    session.send("\x1b[200~/who\rjumps?\x1b[201~\r")  # terminals send line breaks as this; no command either
    session.read_until("step 2/2")
    session.read_until(READY)
    session.send("/history\n")
    assert "/who\r\njumps?\r\n" in session.read_until("assistant: ")
    session.read_until(READY)
    session.send("Who?\n")
    session.read_until("<held>")
    os.kill(session.pid, signal.SIGTERM)  # in the middle of an answer
    assert session.wait() == TERMINATED and "\x1b[?25l" in session.shown
    assert cursor_is_back(session.shown) and "Traceback" not in session.shown
    assert termios.tcgetattr(session.master) == session.before


def test_terminated_at_the_prompt(terminal):
    session = terminal(held={})
    session.read_until(READY)
    session.send("half a line")
    session.read_until("half a line")
    session.wait_for_rest()
    os.kill(session.pid, signal.SIGTERM)
    assert session.wait() == TERMINATED and session.shown.rstrip().endswith("\x1b[?2004l")
    assert cursor_is_back(session.shown) and termios.tcgetattr(session.master) == session.before


def test_in_a_terminal(terminal, tmp_path):
    # Six passes of the first answer, four of the second, and the third is left at its second.
    session = terminal("--max_new_tokens", "64", "--steps", "64", "--mixing_ratio", "0.1", held={6: 1, 12: 4})
    session.read_until(READY)
    session.send("Who jumps?\n")
    session.read_until("step 5/64")
    session.read_until("<held>")
    session.send("\x03")  # stops the answer
    drawn = session.read_until("neither question nor answer is kept.")
    assert "▁" in drawn and "\x1b[1;32m" in drawn and cursor_is_back(session.shown)
    assert "Stopped after 6 of 64" in drawn
    session.read_until(READY)
    session.send("/steps 4\n")
    session.read_until("steps = 4")
    session.read_until(READY)
    session.send("Once more\n")
    session.read_until("step 4/4")
    session.read_until(READY)
    session.send(f"/save {tmp_path}/trace.html\n")
    session.read_until("Written to")
    session.read_until(READY)
    session.send("/history\n")
    assert "Who jumps?" not in session.read_until("assistant: ")
    session.read_until(READY)
    session.send("half a line")
    session.read_until("half a line")
    session.wait_for_rest()  # readline notices a signal only while it waits for the next letter
    session.send("\x03")  # gives up the line
    session.read_until(READY)
    session.send("Who jumps?\n")
    session.read_until("<held>")
    session.send("\x03")
    session.read_until("<signal 3>")
    session.send("\x03")  # leaves at once, in the middle of the step
    assert session.wait() == INTERRUPTED
    assert cursor_is_back(session.shown) and "Traceback" not in session.shown
    assert termios.tcgetattr(session.master) == session.before
    assert (tmp_path / "trace.html").exists()


@pytest.mark.parametrize(("module", "extra"), [("chat", "watch"), ("server", "serve")])
def test_a_missing_extra_is_named(module, extra):
    blocked = {"watch": "rich", "serve": "uvicorn"}[extra]
    code = f"import sys; sys.modules[{blocked!r}] = None; import xdlm_hf.serving.{module}"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert run.returncode == 1
    assert run.stderr.endswith(f"install the extra: pip install 'xdlm_hf[{extra}]'\n")
