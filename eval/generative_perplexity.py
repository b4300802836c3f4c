"""`xdlm-gen-ppl`: generative perplexity of a model for several numbers of sampling steps.

    xdlm-gen-ppl --model outputs/owt-xdlm --tokenizer gpt2 --corpus openwebtext --steps 8 16 32 --samples 5000
    xdlm-gen-ppl --model outputs/small --judge ngram:train.txt --corpus text8 --corpus_files text8.txt --steps 4 8 16

For each number of steps, samples are drawn without a prompt, decoded with their special tokens, and scored by the judge
(`text_judges`): PPL = exp(all nats / all scored tokens), its standard error over samples, and the mean entropy of the
token frequencies within a sample, in nats. Compare perplexities only together with the entropy, and both with those of
real text: with `--corpus` the same number of held-out rows is scored, too, and published values are reported if judge
and length are theirs.

Sampling is exact by default. `--reference_compat` uses the released sampler of the published values: its grid of times,
float32 noise (UDLM: float64) and one more pass than `--steps`. The report states which one was used.
"""

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from xdlm_hf.data.corpora import CORPORA, corpus_rows, find_corpus, load_corpus
from xdlm_hf.data.readers import load_documents
from xdlm_hf.evaluation.published_text import published_samples
from xdlm_hf.evaluation.text_judges import NGRAM, CausalJudge, Judge, NgramJudge, entropies, perplexity
from xdlm_hf.evaluation.text_models import (
    add_model_options,
    check_positive,
    device_of,
    identity,
    load_text_model,
    value_with_error,
)

EXACT = "exact"
RELEASED = "reference_compat: the released grid and noise (float32, UDLM float64), one more pass than steps"
JUDGE = "gpt2-large"
# Options of generate() that the command sets itself, and what to do instead of passing them in --generate.
OWN_OPTIONS = {
    "steps": "pass --steps",
    "max_new_tokens": "pass --length",
    "num_return_sequences": "pass --samples and --batch_size",
    "generator": "pass --seed",
    "seed": "pass --seed",
    "return_dict_in_generate": "leave it out; the samples go to --save_texts",
    "reference_compat": "pass --reference_compat",
    "mixing_ratio": "pass --mixing_ratio",
}


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, measure, print a table, and write the report as JSON."""
    options = _parser().parse_args(argv)
    try:
        report = measure(options)
    except (ValueError, OSError) as error:
        raise SystemExit(f"xdlm-gen-ppl: {error}") from error
    print(markdown(report))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="xdlm-gen-ppl", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_model_options(parser)
    add = parser.add_argument
    add("--steps", type=int, nargs="+", default=[8, 16, 32, 64, 128], help="numbers of sampling steps, one cell each")
    add("--samples", type=int, default=5000, help="samples for each number of steps")
    add("--judge", default=JUDGE, help=f"folder or Hub name of a causal model, or {NGRAM}FILE; default: {JUDGE}")
    add("--ngram_order", type=int, default=6, help="longest n-gram of an n-gram judge")
    add("--corpus", choices=CORPORA, help="training corpus: its held-out text and published values")
    add("--corpus_files", nargs="+", help="local files with the corpus' held-out text")
    add("--text_column", help="column of the text in those files")
    add("--reference_compat", action="store_true", help="use the released sampler")
    add("--generate", type=json.loads, default={}, help='further options of generate() as JSON, {"sampler": ...}')
    add("--seed", type=int, default=0, help="of the samples")
    add("--batch_size", type=int, default=16, help="samples drawn together")
    add("--judge_batch_size", type=int, default=8, help="samples judged together")
    add("--output", type=Path, help="JSON file for the report")
    add("--save_texts", type=Path, help="JSONL file for the samples")
    return parser


# --------------------------------------------------------------------------------------------------------------------
# Measuring


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """The report of a run. Options and inputs are checked before a sample is drawn.

    Args:
        options: As parsed from the command line.

    Raises:
        ValueError: If a number is not positive, a file or model cannot be read, a tokenizer does not fit, the judge
            is missing or a diffusion model, or options of generation contradict each other.
    """
    check_options(options)
    judge = load_judge(options)
    model, tokenizer, average = load_text_model(options, options.reference_compat)
    report = {
        **identity(options, model, average),
        "samples": options.samples,
        "seed": options.seed,
        "sampling": sampling(options),
        "generate": {"sampler": "ancestral", **options.generate},
        "judge": judge.description,
        "held_out": None,
        "cells": [],
    }
    length = report["length"]
    if options.corpus is not None:
        rows = held_out_rows(options, tokenizer, length)
        figures, _ = judged(judge, tokenizer, rows, length)
        report["held_out"] = {"corpus": options.corpus, "rows": len(rows), **figures}
    for steps in options.steps:
        ids, passes = draw(options, model, steps, length)
        figures, texts = judged(judge, tokenizer, ids, length)
        published = published_samples(options.corpus, report["row"], steps)
        if published is not None and (Path(options.judge).name != JUDGE or length != published["length"]):
            published = None  # of another judge or length, which cannot be compared
        report["cells"].append({"steps": steps, "num_forward_passes": passes, **figures, "published": published})
        _write(options, report, steps, texts)
    return report


def check_options(options: argparse.Namespace) -> None:
    """Check numbers and paths.

    Raises:
        ValueError: If one is invalid, naming the option.
    """
    check_positive(options, "samples", "steps", "length", "batch_size", "judge_batch_size", "ngram_order")
    if not isinstance(options.generate, dict):
        raise ValueError(f"--generate {options.generate!r} must be a JSON object of options of generate().")
    for name in options.generate:
        if name in OWN_OPTIONS:
            raise ValueError(f"--generate cannot set {name!r}, which the command sets itself; {OWN_OPTIONS[name]}.")
    for name in ("corpus_files", "text_column"):
        if getattr(options, name) is not None and options.corpus is None:
            raise ValueError(f"--{name} is for held-out text; pass --corpus, too.")
    for path in (options.output, options.save_texts):
        if path is not None and not path.parent.is_dir():
            raise ValueError(f"{str(path)!r} cannot be written: there is no folder {str(path.parent)!r}.")


def sampling(options: argparse.Namespace) -> str:
    """How samples are drawn, for the report: only the ancestral sampler is exact."""
    sampler = options.generate.get("sampler", "ancestral")
    if sampler == "ancestral":
        return RELEASED if options.reference_compat else EXACT
    return ("reference_compat: " if options.reference_compat else "") + f"the {sampler} sampler (not exact)"


def load_judge(options: argparse.Namespace) -> Judge:
    """The judge.

    Raises:
        ValueError: If it cannot be read.
    """
    if not options.judge.startswith(NGRAM):
        return CausalJudge(options.judge, device_of(options.device), options.judge_batch_size)
    file = options.judge.removeprefix(NGRAM)
    if options.corpus is None:
        documents = load_documents(data_files=[file])
    else:  # detokenized like the training text; of text8 only the training part
        splits = find_corpus(options.corpus)[0].splits
        documents = load_corpus(options.corpus, "train" if "train" in splits else None, data_files=[file])
    return NgramJudge((row["text"] for row in documents), options.ngram_order, file)


def held_out_rows(options: argparse.Namespace, tokenizer: PreTrainedTokenizerBase, length: int) -> torch.Tensor:
    """Rows of held-out text, at most as many as samples, cut like training rows: (R, L)."""
    rows = corpus_rows(
        options.corpus,
        tokenizer,
        length,
        data_files=options.corpus_files,
        text_column=options.text_column,
        insert_eos=options.corpus != "text8" or options.reference_compat,
        released=options.reference_compat,
        max_rows=options.samples,
    )
    whole = [row["input_ids"] for row in rows if len(row["input_ids"]) == length]
    return torch.stack(whole)


def draw(options: argparse.Namespace, model: PreTrainedModel, steps: int, length: int) -> tuple[torch.Tensor, int]:
    """Samples (R, L) without a prompt, and forward passes of a batch. All cells start from the same seed."""
    generator = torch.Generator().manual_seed(options.seed)
    settings = {"sampler": "ancestral", "eos_token_id": [], **options.generate, "steps": steps}
    settings |= {"max_new_tokens": length, "return_dict_in_generate": True}
    if options.reference_compat:
        settings["reference_compat"] = True
    if options.mixing_ratio is not None:
        settings["mixing_ratio"] = options.mixing_ratio
    ids = []
    with tqdm(total=options.samples, desc=f"{steps} steps", unit=" samples", leave=False) as bar:
        while bar.n < options.samples:
            rows = min(options.batch_size, options.samples - bar.n)
            output = model.generate(num_return_sequences=rows, generator=generator, **settings)
            ids.append(output.sequences.cpu())
            bar.update(rows)
    return torch.cat(ids), output.num_forward_passes


def judged(
    judge: Judge, tokenizer: PreTrainedTokenizerBase, ids: torch.Tensor, length: int
) -> tuple[dict[str, float], list[str]]:
    """Perplexity and entropy of rows (R, L), each with its standard error, and their texts."""
    texts = tokenizer.batch_decode(ids.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    figures, entropy = perplexity(*judge.score(texts, length)), entropies(ids)
    figures["entropy"] = entropy.mean().item()
    if len(ids) > 1:
        figures["entropy_standard_error"] = entropy.std().item() / math.sqrt(len(ids))
    return figures, texts


# --------------------------------------------------------------------------------------------------------------------
# The report


def _write(options: argparse.Namespace, report: dict[str, Any], steps: int, texts: Sequence[str]) -> None:
    """Write report and texts; called after every cell, to keep the results of a run that ends early."""
    if options.output is not None:
        options.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if options.save_texts is not None:
        with options.save_texts.open("w" if len(report["cells"]) == 1 else "a", encoding="utf-8") as file:
            file.writelines(json.dumps({"steps": steps, "text": text}) + "\n" for text in texts)


def markdown(report: dict[str, Any]) -> str:
    """The report as a table."""
    unit = report["judge"]["unit"]
    lines = [
        f"{report['model']}: {report['row']}, {report['samples']} samples of {report['length']} tokens, "
        f"seed {report['seed']}. Sampling: {report['sampling']}. Judge: {report['judge']['name']}.",
        "",
        f"| steps | passes | perplexity per {unit} | entropy (nats) | published perplexity | entropy |",
        "| ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for cell in report["cells"]:
        theirs = cell["published"] or {}
        published = [f"{theirs[name]:.3f}" if theirs else "-" for name in ("perplexity", "entropy")]
        passes = str(cell["num_forward_passes"])
        lines.append("| " + " | ".join([str(cell["steps"]), passes, *_figures(cell), *published]) + " |")
    if report["held_out"]:
        lines.append("| " + " | ".join(["held-out text", "", *_figures(report["held_out"]), "", ""]) + " |")
    return "\n".join(lines)


def _figures(cell: dict[str, Any]) -> list[str]:
    return [value_with_error(cell, "perplexity", 2), value_with_error(cell, "entropy", 3)]


if __name__ == "__main__":
    main()
