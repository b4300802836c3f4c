"""JSON by a schema: are all answers valid, what does it cost in quality, and in time?

    python benchmarks/json_schemas.py             # all three, or one:
    python benchmarks/json_schemas.py validity    # 200 random schemas, random weights; about 10 minutes on one core
    python benchmarks/json_schemas.py quality     # trains a small model; about 10 minutes on one core
    python benchmarks/json_schemas.py cost        # a vocabulary of 126,464 random tokens; about 5 minutes

Validity is judged by the package jsonschema. Random weights are the worst case: nothing in the distributions prefers
JSON. An answer of `quality` is an object with the direction that the prompt names and 8 to 16 letters that follow each
other; its first letter and its length are free choices, which all tokens of an answer must share.
"""

import argparse
import json
import random
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from string import ascii_lowercase
from typing import Any

import jsonschema
import torch
from decoding_quality import BATCH, K, trained
from measure import interleaved_seconds, machine
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from xdlm_hf import LLaDAConfig, LLaDAForDiffusionLM
from xdlm_hf.data.tokenizer import train_tokenizer
from xdlm_hf.generation.json_schema import schema_automaton
from xdlm_hf.generation.token_automaton import TokenAutomaton, Vocabulary

WORDS = "alpha beta gamma delta name size color count total price city street user id état größe naïve 東京 q1".split()
PATTERNS = ("^[A-Z]{2}-\\d{3}$", "^(red|green)+$", "\\w+@\\w+\\.org", "[^ ]{1,6}", "^\\+?\\d{4,8}$", '^"?x?"?$')
PROMPT, ANSWER = 13, 43
CONSOLE = Console(width=120)


# ---------------------------------------------------------------------------------------------------------------------
# Validity


def random_schema(rng: random.Random, depth: int = 2) -> dict[str, Any]:
    """A schema of all supported features; objects and arrays nest up to `depth`."""
    kinds = ["string", "integer", "number", "boolean", "enum", "null", "any of", "types"]
    kind = rng.choice(kinds + ["object", "array", "tuple"] * 3 if depth else kinds)
    below = partial(random_schema, rng, depth - 1)
    if kind == "object":
        names = rng.sample(WORDS, rng.randint(1, 3))
        required = rng.sample(names, rng.randint(0, len(names)))
        return {"type": "object", "properties": {n: below() for n in names}, "required": required}
    if kind == "array":
        least = rng.randint(0, 2)
        return {"type": "array", "items": below(), "minItems": least, "maxItems": least + rng.randint(0, 2)}
    if kind == "tuple":
        return {"type": "array", "prefixItems": [below() for _ in range(rng.randint(1, 2))], "items": False}
    if kind == "enum":
        return {"enum": rng.sample([*WORDS, 0, -1.5, True, None, [1, "a"], {'a"b': 2}, "x\ny"], rng.randint(1, 4))}
    if kind == "any of":
        return {"anyOf": [random_schema(rng, 0) for _ in range(2)]}
    if kind == "types":
        return {"type": ["string", rng.choice(["integer", "boolean", "null"])], "maxLength": 4}
    if kind == "string":
        least = rng.randint(0, 4)
        bounds = {"minLength": least, "maxLength": least + rng.randint(0, 8)}
        options = ({}, bounds, {"pattern": rng.choice(PATTERNS)}, {"format": rng.choice(["date", "uuid"])})
        return {"type": "string", **rng.choice(options)}
    if kind == "integer":
        least = rng.randint(-200, 200)
        bounds = {"minimum": least, "exclusiveMaximum": least + rng.randint(1, 500)}
        return {"type": "integer", **rng.choice(({}, bounds, {"minimum": least}, {"maximum": least}))}
    return {"type": kind}


def is_valid(text: str, schema: dict[str, Any]) -> bool:
    try:
        jsonschema.validate(json.loads(text), schema, jsonschema.Draft202012Validator)
    except (ValueError, RecursionError, jsonschema.ValidationError):
        return False
    return True


def model_of(tokenizer: PreTrainedTokenizerBase, width: int, layers: int, length: int, **options: Any) -> Any:
    torch.manual_seed(0)
    rows = options.pop("rows", len(tokenizer))
    ids = {name: getattr(tokenizer, name) for name in ("mask_token_id", "eos_token_id", "pad_token_id")}
    sizes = dict(d_model=width, n_heads=4, n_kv_heads=4, n_layers=layers, mlp_hidden_size=2 * width)
    shape = dict(vocab_size=rows, embedding_size=rows, max_sequence_length=length)
    return LLaDAForDiffusionLM(LLaDAConfig(**sizes, **shape, **ids, **options))


def validity(number: int, length: int = 96) -> None:
    rng = random.Random(0)
    drafts = [random_schema(rng) for _ in range(20 * number)]
    tokenizer = train_tokenizer([json.dumps(schema, ensure_ascii=False) for schema in drafts], vocab_size=600)
    vocabulary, end = Vocabulary.of(tokenizer), tokenizer.eos_token_id
    schemas: list[dict[str, Any]] = []
    for schema in drafts:
        if schema in schemas or not {"properties", "items"} & set(schema) or len(schemas) == number:
            continue
        language = schema_automaton(json.dumps(schema))
        if TokenAutomaton(language, vocabulary, len(tokenizer), [end]).shortest <= length:
            schemas.append(schema)
    model = model_of(tokenizer, 32, 1, 512, init_std=0.3).eval()
    settings: dict[str, dict[str, Any]] = {
        "k = 0": {"mixing_ratio": 0.0},
        "k = 0.1": {"mixing_ratio": 0.1},
        "k = 0.5, 4 polishing steps": {"mixing_ratio": 0.5, "polish_steps": 4},
        "k = 0.1, temperature 1": {"mixing_ratio": 0.1, "temperature": 1.0},
    }
    runs = {(name, True): options for name, options in settings.items()}
    runs |= {(name, False): settings[name] for name in ("k = 0", "k = 0.1")}
    valid, edits = Counter(), Counter()
    for i, schema in enumerate(tqdm(schemas, desc="schemas")):
        prompt = tokenizer(f"{i}: {json.dumps(schema, ensure_ascii=False)}", return_tensors="pt").input_ids[:, :64]
        common = dict(max_new_tokens=length, steps=8, seed=i, tokenizer=tokenizer, return_dict_in_generate=True)
        for (name, constrained), options in runs.items():
            given = {"json_schema": schema} if constrained else {}
            output = model.generate(prompt, **common, **options, **given)
            text = tokenizer.decode(output.sequences[0, prompt.shape[1] :], skip_special_tokens=True)
            valid[name, constrained] += is_valid(text, schema)
            edits[name, constrained] += int(output.num_edits)
    rows = [
        [name, "yes" if constrained else "no", f"{valid[key]} of {len(schemas)}", f"{edits[key] / len(schemas):.1f}"]
        for key in runs
        for name, constrained in [key]
    ]
    show("schemas, random weights", ["decoding", "json_schema", "valid", "edits per answer"], rows)


# ---------------------------------------------------------------------------------------------------------------------
# Quality

RECORD = {
    "type": "object",
    "properties": {
        "up": {"type": "boolean"},
        "letters": {"type": "string", "pattern": "[a-z]{8,16}"},
    },
    "required": ["up", "letters"],
}


def record(rng: random.Random) -> tuple[str, str]:
    """A prompt and one of its right answers: six letters with signs, then letters of the alphabet in that direction."""
    sign, first = rng.choice("<>"), rng.randrange(26)
    prompt = "".join(letter + sign for letter in rng.choices(ascii_lowercase, k=6)) + ":"
    places = [(first + (n if sign == ">" else -n)) % 26 for n in range(rng.randint(8, 16))]
    letters = "".join(ascii_lowercase[place] for place in places)
    return prompt, json.dumps({"up": sign == ">", "letters": letters}, separators=(",", ":"))


def is_right(prompt: str, text: str) -> bool:
    """Whether an answer is valid, says the direction of the prompt, and has letters that follow each other in it."""
    if not is_valid(text, RECORD):
        return False
    value, step = json.loads(text), 1 if ">" in prompt else -1
    places = [ascii_lowercase.index(letter) for letter in value["letters"]]
    follows = all((after - before) % 26 == step % 26 for before, after in zip(places, places[1:], strict=False))
    return follows and value["up"] == (step == 1)


class Records(Dataset):
    """Training rows; row i is drawn from the seed i + 1000, so none is one of the problems."""

    prompt_mask = torch.arange(PROMPT + ANSWER) < PROMPT

    def __init__(self, tokenizer: PreTrainedTokenizerBase, number: int):
        self.tokenizer, self.number = tokenizer, number

    def __len__(self) -> int:
        return self.number

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        prompt, answer = (self.tokenizer(text).input_ids for text in record(random.Random(index + 1000)))
        ends = [self.tokenizer.eos_token_id] * (ANSWER - len(answer))
        return {"input_ids": torch.tensor([*prompt, *answer, *ends]), "prompt_mask": self.prompt_mask}


def quality(folder: Path, steps: int, problems: int, repeats: int, clock: Callable[[], float]) -> None:
    tokenizer = train_tokenizer(["every byte is a token"], vocab_size=262)
    start = model_of(tokenizer, 64, 3, PROMPT + ANSWER, mixing_ratio=K, rope_theta=1e3, init_std=0.05)
    rows = Records(tokenizer, steps * BATCH)
    model = LLaDAForDiffusionLM.from_pretrained(trained(folder, start, rows, steps, 4e-3, adam_beta2=0.98)).eval()
    rng = random.Random(0)
    prompts = [record(rng)[0] for _ in range(problems)]
    ids = tokenizer(prompts, return_tensors="pt").input_ids
    cells = []
    policies: dict[str, dict[str, Any]] = {
        "k = 0": {"mixing_ratio": 0.0},
        "k = 0.1": {"mixing_ratio": 0.1},
        "edits above 0.5": {"refinement": {"policy": "threshold", "threshold": 0.5}},
    }
    for name, options in policies.items():
        for n in (4, 8, 16, 32):
            common = dict(max_new_tokens=ANSWER, steps=n, tokenizer=tokenizer, **options)
            texts = {}

            def run(which: str, common: dict[str, Any] = common, texts: dict[str, Any] = texts, **given: Any) -> None:
                answers = model.generate(ids, **common, **given)[:, PROMPT:]
                texts[which] = tokenizer.batch_decode(answers, skip_special_tokens=True)

            work = {"with": partial(run, "with", json_schema=RECORD), "without": partial(run, "without")}
            seconds = interleaved_seconds(work, repeats, clock)
            cells.append([name, str(n), *compared(prompts, texts["with"], texts["without"])])
            cells[-1].append(f"{seconds['with'] / seconds['without']:.2f}")
            print(cells[-1], flush=True)
    columns = ["decoding", "steps", "valid, %", "without", "right, %", "without", "difference", "time ratio"]
    show(f"records: {problems} problems, {sum(p.numel() for p in model.parameters())} parameters", columns, cells)


def compared(prompts: list[str], with_: list[str], without: list[str]) -> list[str]:
    """Shares of valid and right answers with and without the schema, and the paired difference of the latter."""
    valid, right = (
        [
            torch.tensor([judge(*pair) for pair in zip(prompts, texts, strict=True)]).double()
            for texts in (with_, without)
        ]
        for judge in (lambda _, text: is_valid(text, RECORD), is_right)
    )
    difference = right[0] - right[1]
    error = 100 * difference.std() / len(prompts) ** 0.5
    shares = [f"{100 * share.mean():.1f}" for share in (*valid, *right)]
    return [*shares, f"{100 * difference.mean():+.1f} ± {error:.1f}"]


# ---------------------------------------------------------------------------------------------------------------------
# Cost


def random_vocabulary(number: int) -> list[bytes | None]:
    """The 256 bytes, then random words, some of them after a space or punctuation; special tokens at the end."""
    rng = random.Random(0)
    tokens = {bytes([i]): None for i in range(256)}
    while len(tokens) < number - 100:
        start = rng.choice(["", " ", " ", " ", '"', ': "', '{"', '", "', "é", "1"])
        word = "".join(rng.choice("etaoinshrdlucmfwypvbgkjqxz0123456789") for _ in range(rng.randint(1, 9)))
        tokens[(start + word).encode()] = None
    return [*tokens, *[None] * 100]


def cost(repeats: int, clock: Callable[[], float]) -> None:
    size, rows = 126464, []
    start = time.perf_counter()
    vocabulary = Vocabulary(random_vocabulary(size))
    print(f"trie of {size} tokens: {time.perf_counter() - start:.1f} s, {vocabulary.num_nodes} prefixes", flush=True)
    model = small_model(size)
    for name, schema in {"record": RECORD, "string up to 100": {"type": "string", "maxLength": 100},
                         "any object": {"type": "object"}}.items():  # fmt: skip
        start = time.perf_counter()
        language = schema_automaton(json.dumps(schema))
        automaton = TokenAutomaton(language, vocabulary, size, [size - 1], [], [size - 2])
        seconds = time.perf_counter() - start
        counts = [automaton.num_states, automaton.num_classes, len(automaton.source), len(automaton.members)]
        for length in (64, 256):
            logits = torch.randn(length, size, generator=torch.Generator().manual_seed(0))
            ids = torch.full((1, length), size - 2)
            scores = automaton.class_scores(logits)
            work = {
                "classes": partial(automaton.class_scores, logits),
                "path": partial(automaton.path, scores[None]),
                "softmax": partial(torch.softmax, logits, -1),
                "forward": lambda ids=ids: forward(model, ids),
            }
            took = interleaved_seconds(work, repeats, clock)
            both = took["classes"] + took["path"]
            cells = [f"{took[part]:.3f}" for part in work]
            ratios = [f"{both / took['softmax']:.1f}", f"{both / took['forward']:.2f}"]
            rows.append([name, str(length), f"{seconds:.1f}", *map(str, counts), *cells, *ratios])
    columns = ["schema", "L", "build, s", "S", "C", "E", "W", "classes, s", "path, s", "softmax, s", "forward, s"]
    show(f"one step, {size} random tokens", [*columns, "/ softmax", "/ forward"], rows)


def small_model(size: int) -> Any:
    torch.manual_seed(0)
    shape = dict(vocab_size=size, embedding_size=size, d_model=256, n_heads=4, n_kv_heads=4, n_layers=4)
    ids = dict(mask_token_id=size - 2, eos_token_id=size - 1, pad_token_id=size - 1)
    return LLaDAForDiffusionLM(LLaDAConfig(**shape, mlp_hidden_size=512, max_sequence_length=512, **ids)).eval()


@torch.no_grad()
def forward(model: Any, ids: Tensor) -> Tensor:
    return model(input_ids=ids).logits


def show(title: str, columns: list[str], rows: list[list[str]]) -> None:
    table = Table(title=f"{title}, {machine()}")
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left")
    for row in rows:
        table.add_row(*row)
    CONSOLE.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="?", choices=["all", "validity", "quality", "cost"], default="all")
    parser.add_argument("--schemas", type=int, default=200)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/records"))
    parser.add_argument("--steps", type=int, default=800, help="optimizer steps of the training")
    parser.add_argument("--problems", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=3, help="rounds of timing after a warm-up")
    parser.add_argument("--cpu-time", action="store_true", help="measure this process's CPU time, not wall time")
    options = parser.parse_args()
    clock = time.process_time if options.cpu_time else time.perf_counter
    if options.part in ("all", "validity"):
        validity(options.schemas)
    if options.part in ("all", "quality"):
        quality(options.output_dir, options.steps, options.problems, options.repeats, clock)
    if options.part in ("all", "cost"):
        cost(options.repeats, clock)


if __name__ == "__main__":
    main()
