"""Time to resume a data stream: from its state in the checkpoint, and by reading all earlier rows again.

The script reads the rows of `--steps` optimizer steps from local JSONL files as training does (tokenizer, shuffling,
packing), and then resumes in a fresh object in two ways: from the state, and as Transformers' Trainer does, by reading
and dropping all earlier batches. It reports the seconds until the next row, and whether both give the same row.

    python benchmarks/resume.py [--steps 500] [--rows_per_step 64] [--length 512]
"""

import argparse
import itertools
import json
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from measure import machine

from xdlm_hf.data.readers import load_documents, python_reference_documents
from xdlm_hf.data.stream import PackedStream
from xdlm_hf.data.tokenizer import train_tokenizer

FILES = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--rows_per_step", type=int, default=64)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--shuffle_buffer", type=int, default=2_000)
    options = parser.parse_args()
    rows = options.steps * options.rows_per_step
    folder = Path(tempfile.mkdtemp())
    try:
        texts = [document["text"] for document in python_reference_documents()]
        tokenizer = train_tokenizer(texts, 4096)
        write(texts, folder, tokens=rows * options.length)

        def rest(state: dict | None, skip: int) -> Iterator[tuple[dict, dict]]:
            documents = load_documents(data_files=[str(folder / "*.jsonl")])
            stream = PackedStream(
                documents, tokenizer, options.length, shuffle_seed=0, shuffle_buffer=options.shuffle_buffer
            )
            return itertools.islice(stream.read(state=state), skip, None)

        for _, state in itertools.islice(rest(None, 0), rows):  # noqa: B007  (the last state is wanted)
            pass
        by_state, seconds_by_state = timed(lambda: next(rest(json.loads(json.dumps(state)), 0)))
        by_reading, seconds_by_reading = timed(lambda: next(rest(None, rows)))
    finally:
        shutil.rmtree(folder)
    same = by_state[0]["input_ids"].equal(by_reading[0]["input_ids"])
    print(f"{machine()}; {rows} rows of {options.length} tokens = {options.steps} steps\n")
    print("| resuming | seconds until the next row |")
    print("| --- | ---: |")
    print(f"| by the state in the checkpoint ({len(json.dumps(state))} bytes) | {seconds_by_state:.2f} |")
    print(f"| by reading everything again | {seconds_by_reading:.2f} |")
    print(f"\nThe same row: {same}. Ratio {seconds_by_reading / seconds_by_state:.0f}.")


def write(texts: list[str], folder: Path, tokens: int) -> None:
    """Writes JSONL files with more text than is read: paragraphs, numbered so that all documents differ."""
    paragraphs = [part for text in texts for part in text.split("\n\n") if len(part) > 200]
    characters, number = 0, itertools.count()
    files = [open(folder / f"{index}.jsonl", "w", encoding="utf-8") for index in range(FILES)]
    while characters < 8 * tokens:  # a token of this tokenizer is about three characters
        for paragraph in paragraphs:
            i = next(number)
            characters += len(paragraph)
            files[i % FILES].write(json.dumps({"text": f"{i}. {paragraph}"}) + "\n")
    for file in files:
        file.close()


def timed(run):
    start = time.perf_counter()
    result = run()
    return result, time.perf_counter() - start


if __name__ == "__main__":
    main()
