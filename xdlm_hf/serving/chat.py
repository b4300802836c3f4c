"""`xdlm-chat`: a conversation in the terminal, every answer drawn while it is denoised.

    xdlm-chat --model PATH [--steps 64] [--mixing_ratio 0.1]

Lines that begin with a slash are commands; /help lists them. A pasted text of several lines is one message. Ctrl-C
stops the answer being generated, and at the prompt the program. If the input is no terminal, every line of it is a
message, and the output has the answers alone; notes and errors go to the standard error. Needs the extra `watch`.
"""

import argparse
import contextlib
import io
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from ..generation.blocks import check_blocks
from ..generation.config import XDLMGenerationConfig
from ..generation.protocol import length_limit
from ..loading import DTYPES, add_version_option, end_ids, end_of_turn_ids, load

try:
    from rich.console import Console
    from rich.text import Text

    from ..watch.streamers import LiveStreamer
    from ..watch.tokens import without_controls
    from ..watch.trace import save_trace
except ModuleNotFoundError as error:
    raise SystemExit(f"xdlm-chat: {error}; install the extra: pip install 'xdlm_hf[watch]'") from error
with contextlib.suppress(ImportError):
    import readline  # gives input() its line editing and history
PROMPT = "> "
INTERRUPTED, TERMINATED = 130, 143  # what shells report for a program that Ctrl-C or SIGTERM ended
HELP = """\
/steps N         denoising steps per answer        /k RATIO   mixing ratio of the sampler
/length N        tokens per answer                 /block N   tokens filled together
/temperature T   0 is greedy                       /clear     forget the conversation
/history         show the conversation             /save FILE the last answer, step by step, as HTML
/help            this list                         /quit      leave; so do Ctrl-D and Ctrl-C
Without a value, a setting is shown; `default` restores the checkpoint's."""


class Stopped(Exception):
    """The answer was stopped by Ctrl-C."""


class Chat:
    """A conversation with one model.

    Args:
        model, tokenizer: The model in evaluation mode, and its tokenizer.
        settings: Options of `generate`: max_new_tokens, steps, block_length, mixing_ratio, temperature.
        console: Where to draw.
        interactive: False prints the answers alone, when they are complete, and notes and errors on the standard error.
    """

    # command -> (option of generate, type of its value)
    SETTINGS: dict[str, tuple[str, Callable[[str], Any]]] = {
        "/steps": ("steps", int),
        "/k": ("mixing_ratio", float),
        "/temperature": ("temperature", float),
        "/block": ("block_length", int),
        "/length": ("max_new_tokens", int),
    }

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        settings: dict[str, Any],
        console: Console | None = None,
        interactive: bool = True,
    ):
        self.model, self.tokenizer, self.interactive = model, tokenizer, interactive
        self.console = Console() if console is None else console
        self.notes = self.console if interactive else Console(stderr=True)
        self.settings = {name: value for name, value in settings.items() if value is not None}
        XDLMGenerationConfig(**self.settings)
        self.messages: list[dict[str, str]] = []
        self.streamer: LiveStreamer | None = None  # of the last answer
        self.ends = sorted(end_ids(model, tokenizer) | end_of_turn_ids(tokenizer))

    def run(self) -> int:
        """Read and answer until the user leaves; the exit status, 1 if some line of piped input was refused."""
        failed = False
        if self.interactive:
            self._greet()
        while True:
            try:
                line = input(PROMPT if self.interactive else "").strip()
            except EOFError:
                if self.interactive:
                    self.console.print()
                return int(failed)
            except KeyboardInterrupt:
                self.notes.print()
                if _typed():
                    continue  # clears the line only
                return INTERRUPTED
            if line == "/quit":
                return int(failed)
            try:
                self._handle(line)
            except KeyboardInterrupt:
                self.notes.print()
                return INTERRUPTED
            except (ValueError, OSError) as error:
                failed = not self.interactive
                self.notes.print(Text(str(error), style="red"))

    def _greet(self) -> None:
        self._say(f"{self.model.name_or_path or 'model'}; /help lists the commands, /quit leaves.")
        if not self.tokenizer.chat_template:
            self._say(
                "Its tokenizer has no chat template, so this is a base model: it continues the text of the whole "
                "conversation instead of answering."
            )

    def _handle(self, line: str) -> None:
        """Handle one line, a command or a message; several lines, as pasted, are a message.

        Raises:
            ValueError: If it is not UTF-8, or the command or its value is invalid.
            KeyboardInterrupt: On the second Ctrl-C during an answer.
        """
        try:
            line.encode()
        except UnicodeEncodeError as error:  # bytes that could not be decoded arrive as lone surrogates
            raise ValueError("this line holds bytes that are not UTF-8; enter it again without them.") from error
        command, _, value = line.partition(" ")
        value = value.strip()
        if not line:
            return
        if "\n" in line:
            self.answer(line)
        elif command in self.SETTINGS:
            self._set(command, value)
        elif command == "/help":
            self._say(HELP)
        elif command == "/clear":
            self.messages = []
            self._say("Forgotten.")
        elif command == "/history":
            self._show()
        elif command == "/save":
            self._save(value)
        elif command.startswith("/"):
            raise ValueError(f"there is no command {command}; /help lists them.")
        else:
            self.answer(line)

    def answer(self, text: str) -> None:
        """Answer a message, drawn live if there is a user; a stopped answer leaves the conversation unchanged.

        Raises:
            ValueError: If the message is too long.
            KeyboardInterrupt: On the second Ctrl-C during an answer; without a user on the first.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        ids = self._encode_fitting(messages)
        steps = self.settings.get("steps", self._option("steps")) or self._length
        console = self.console if self.interactive else Console(file=io.StringIO(), quiet=True)
        streamer = LiveStreamer(self.tokenizer, self.model.config.mask_token_id, steps=steps, console=console)
        self.streamer = streamer
        try:
            with _interrupts() as stop, streamer:
                _raise_when(streamer, stop)
                options = {**self.settings, "max_new_tokens": self._length}
                self.model.generate(input_ids=ids, streamer=streamer, eos_token_id=self.ends, **options)
        except Stopped as stopped:
            if not self.interactive:
                raise KeyboardInterrupt from stopped
            self.console.print(Text(streamer.answer()))
            self._say(f"Stopped after {streamer.steps} of {steps} steps; neither question nor answer is kept.")
            return
        if not self.interactive:
            self.console.print(Text(streamer.answer()), soft_wrap=True)
        self.messages = [*messages, {"role": "assistant", "content": streamer.answer()}]

    @property
    def _length(self) -> int:
        """Tokens of an answer: as set, as the checkpoint says, or 128; at most half of a model shorter than 256."""
        given = self.settings.get("max_new_tokens") or self._option("max_new_tokens")
        return given or min(128, length_limit(self.model.config) // 2)

    def _option(self, name: str) -> Any:
        return getattr(self.model.generation_config, name, None)

    def _encode_fitting(self, messages: list[dict[str, str]]) -> Tensor:
        """Ids of the conversation, (1, P), without the oldest turns if it is too long.

        Raises:
            ValueError: If the last message alone is too long.
        """
        room = length_limit(self.model.config) - self._length
        ids = self._encode(messages[-1:])  # first: a long message is slow to encode, and slower with earlier turns
        if ids.shape[1] > room:
            raise ValueError(
                f"this message of {ids.shape[1]} tokens and an answer of {self._length} do not fit the model's "
                f"{length_limit(self.model.config)}; shorten it, or the answer with /length."
            )
        for first in range(0, len(messages), 2):
            ids = self._encode(messages[first:])
            if ids.shape[1] <= room:
                break
        if first:
            self._say(f"The first {first // 2} turns no longer fit and are left out.")
        return ids.to(self.model.device)

    def _encode(self, messages: list[dict[str, str]]) -> Tensor:
        if self.tokenizer.chat_template:
            text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            return self.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        text = "\n".join(message["content"] for message in messages)
        return self.tokenizer(text, return_tensors="pt")["input_ids"]

    def _set(self, command: str, value: str) -> None:
        name, kind = self.SETTINGS[command]
        if value == "default":
            self.settings.pop(name, None)
        elif value:
            try:
                number = kind(value)
            except ValueError as error:
                raise ValueError(f"{command} {value}: not a number; {command} takes one, or `default`.") from error
            XDLMGenerationConfig(**{name: number})
            self.settings[name] = number
        self._say(f"{name} = {self.settings.get(name, 'default')}")
        try:
            check_blocks(
                self.settings.get("steps", self._length), self._length, self.settings.get("block_length", self._length)
            )
        except ValueError as error:  # not refused: the next command may make the settings fit
            self._say(f"Before the next answer: {error}")

    def _show(self) -> None:
        for message in self.messages:
            self.console.print(f"{message['role']}: ", style="dim", end="")
            self.console.print(Text(without_controls(message["content"])), soft_wrap=not self.interactive)
        if not self.messages:
            self._say("Nothing was said yet.")

    def _save(self, value: str) -> None:
        if not value:
            raise ValueError("/save needs a file name, e.g. /save trace.html")
        if self.streamer is None or self.streamer.steps == 0:
            raise ValueError("there is no answer to save yet; ask something first.")
        note = ", ".join(f"{name} = {setting}" for name, setting in self.settings.items())
        path, streamer = Path(value).expanduser(), self.streamer
        mask, start = self.model.config.mask_token_id, streamer.prompt_length
        confidences = streamer.confidences
        save_trace(path, streamer.history, self.tokenizer, mask, start, note=note, confidences=confidences)
        self._say(f"Written to {path}.")

    def _say(self, text: str) -> None:
        self.notes.print(Text(text, style="dim"))


@contextlib.contextmanager
def _interrupts() -> Iterator[Callable[[], bool]]:
    """Context in which the first Ctrl-C is recorded, until the step ends; the second raises KeyboardInterrupt."""
    noted = False

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal noted
        if noted:
            raise KeyboardInterrupt
        noted = True

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: noted
    finally:
        signal.signal(signal.SIGINT, before)


def _raise_when(streamer: LiveStreamer, stop: Callable[[], bool]) -> None:
    """Make the streamer raise `Stopped` after a step, once `stop()` is true."""
    draw = streamer.put_draft

    def put_draft(value: Tensor) -> None:
        draw(value)
        if stop():
            raise Stopped

    streamer.put_draft = put_draft


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Context in which SIGTERM unwinds the program, so that cursor and line editing are restored."""

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(TERMINATED)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _typed() -> bool:
    """Whether the line being edited holds text."""
    return "readline" in globals() and bool(readline.get_line_buffer())


def main(argv: list[str] | None = None) -> None:
    """Load the model and chat until the user leaves."""
    parser = argparse.ArgumentParser("xdlm-chat", description=__doc__.split("\n")[0])
    add_version_option(parser)
    parser.add_argument("--model", required=True, help="folder or Hub name of a checkpoint")
    parser.add_argument("--dtype", default="auto", choices=DTYPES)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda:0, ...")
    for name, kind in Chat.SETTINGS.values():
        parser.add_argument(f"--{name}", type=kind, help="as in XDLMGenerationConfig")
    options = vars(parser.parse_args(argv))
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # such a line is refused and does not end the chat
    interactive = sys.stdin.isatty()
    if not interactive:
        disable_progress_bar()
    elif "readline" in globals():
        # Python switches it off. A pasted text arrives as one line with its line breaks.
        readline.parse_and_bind("set enable-bracketed-paste on")
    try:
        model, tokenizer = load(options.pop("model"), options.pop("dtype"), options.pop("device"))
        chat = Chat(model, tokenizer, options, interactive=interactive)
    except ValueError as error:
        raise SystemExit(f"xdlm-chat: {error}") from error
    with _terminable():
        raise SystemExit(chat.run())


if __name__ == "__main__":
    main()
