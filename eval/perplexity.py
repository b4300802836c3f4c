"""`xdlm-perplexity`: perplexities of a diffusion language model on the paper's validation and zero-shot sets.

    xdlm-perplexity --model outputs/owt-xdlm --tokenizer gpt2 --dataset openwebtext zero-shot --output report.json
    xdlm-perplexity --model outputs/small --dataset wikitext lambada --local wikitext=wiki.txt lambada=lambada.jsonl

It reports two values for each set, exp(nats per token) with a standard error over rows:

    bound       the NELBO over t in (0, 1], with alpha from 1 to 0, at `--nelbo_samples` stratified times per row: a
                bound on the likelihood of the rows
    released    the released evaluation: one time per row in (1e-3, 1], stratified over a batch, with the log-linear
                schedule of eps = 1e-3. It omits 0.1 % of the noise at both ends, so it is slightly lower, and it has a
                larger error

`--released` also cuts rows as the released evaluation does (`xdlm_hf.data.wrapping`): without EOS between documents,
without the remaining tokens of every 1,000 documents, and with [CLS] as BERT's EOS. Published values are of such rows
of the scored part; they are reported for no others.
"zero-shot" selects the seven sets of Table 8 and adds their average.
"""

import argparse
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from xdlm_hf.data.collator import DiffusionCollator
from xdlm_hf.data.corpora import CORPORA, ZERO_SHOT, corpus_rows, find_corpus, report
from xdlm_hf.data.wrapping import WrappedDataset
from xdlm_hf.diffusion.process import NoiseProcess, StationaryProcess
from xdlm_hf.evaluation import published_text
from xdlm_hf.evaluation.text_models import (
    add_model_options,
    check_positive,
    identity,
    load_text_model,
    value_with_error,
)
from xdlm_hf.generation.protocol import check_conditioning
from xdlm_hf.training.batch_loss import uses_fused_loss, weighted_loss
from xdlm_hf.training.nelbo import evaluation_noise, nelbo_of_sums
from xdlm_hf.training.row_noise import TRAIN_ROW, TRAIN_STEP, corrupt_rows, generator_of

EPS = 1e-3  # of the released times; that of the schedule is equal
SHUFFLE_SEED = 1
ALL_ZERO_SHOT = "zero-shot"


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, measure, print a table, and write the report as JSON."""
    options = _parser().parse_args(argv)
    try:
        found = measure(options)
    except (ValueError, OSError) as error:
        raise SystemExit(f"xdlm-perplexity: {error}") from error
    print(markdown(found))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="xdlm-perplexity", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_model_options(parser)
    add = parser.add_argument
    add("--dataset", nargs="+", required=True, choices=[*CORPORA, ALL_ZERO_SHOT], help="sets to score")
    add("--local", nargs="+", default=[], metavar="SET=FILE", help="local files to read instead of sets")
    add("--text_column", help="column of the text in local files; default: that of the set")
    add("--part", help="part of every set; default: the one scored in the paper")
    add("--max_rows", type=int, help="maximum number of rows per set; default: all")
    add("--released", action="store_true", help="cut rows as the released evaluation does")
    add("--nelbo_samples", type=int, default=4, help="times per row, for the bound")
    add("--batch_size", type=int, default=16, help="rows per forward pass, and strata of the released times")
    add("--seed", type=int, default=0, help="of times and noise")
    add("--output", type=Path, help="JSON file for the report")
    return parser


# --------------------------------------------------------------------------------------------------------------------
# Measuring


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """The report of a run. All inputs are checked before a row is scored.

    Args:
        options: As parsed from the command line.

    Raises:
        ValueError: If a number is not positive, a set, file or model cannot be read, or a tokenizer does not fit.
    """
    names, files = check_options(options)
    model, tokenizer, average = load_text_model(options, options.released)
    check_conditioning(model, ("timesteps",), "xdlm-perplexity")
    settings = ("nelbo_samples", "batch_size", "seed", "max_rows")
    found = {**identity(options, model, average), **{name: getattr(options, name) for name in settings}}
    found |= {"rows_cut": "as released" if options.released else "without loss", "sets": {}}
    rows = {name: _rows(options, name, files.get(name), tokenizer, found["length"]) for name in names}
    for name in names:
        found["sets"][name] = score(options, model, tokenizer, name, rows[name], found["row"])
        if set(ZERO_SHOT) <= set(found["sets"]):
            found["zero_shot_average"] = averages(found["sets"], found["row"])
        if options.output is not None:
            options.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return found


def check_options(options: argparse.Namespace) -> tuple[list[str], dict[str, list[str]]]:
    """Names of the sets to score, and local files by set.

    Raises:
        ValueError: If options contradict each other, or are out of range.
    """
    check_positive(options, "length", "max_rows", "nelbo_samples", "batch_size")
    files = local_files(options.local)
    names = list(dict.fromkeys(n for name in options.dataset for n in (ZERO_SHOT if name == ALL_ZERO_SHOT else [name])))
    unused = sorted(set(files) - set(names))
    if unused:
        raise ValueError(f"--local {unused[0]}=...: {unused[0]} is not among the sets to score ({', '.join(names)}).")
    if options.text_column is not None and not files:
        raise ValueError(f"--text_column {options.text_column} is for local files; pass them by --local.")
    for name in names:
        find_corpus(name, options.part)
    if options.output is not None and not options.output.parent.is_dir():
        folder = str(options.output.parent)
        raise ValueError(f"{str(options.output)!r} cannot be written: there is no folder {folder!r}.")
    return names, files


def local_files(pairs: Sequence[str]) -> dict[str, list[str]]:
    """Files by set, from `SET=FILE`; a set may have several.

    Raises:
        ValueError: If a pair has another form, or its set is unknown.
    """
    files: dict[str, list[str]] = {}
    for pair in pairs:
        name, sign, file = pair.partition("=")
        if not sign or not file:
            raise ValueError(f"--local {pair!r} must be SET=FILE.")
        find_corpus(name)
        files.setdefault(name, []).append(file)
    return files


def _rows(
    options: argparse.Namespace, name: str, files: list[str] | None, tokenizer: PreTrainedTokenizerBase, length: int
) -> WrappedDataset:
    return corpus_rows(
        name,
        tokenizer,
        length,
        options.part,
        files,
        options.text_column if files else None,
        released=options.released,
        max_rows=options.max_rows,
        show_progress=True,
    )


def score(
    options: argparse.Namespace,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    rows: WrappedDataset,
    row: str,
) -> dict[str, Any]:
    """Both values of one set, counts and checksum of its rows, and the published value."""
    scorer = Scorer(model, tokenizer, options)
    found = {"bound": scorer.bound(rows), "released": scorer.released(rows)}
    for figures in found.values():
        figures["tokens"] = len(rows.tokens)
    return {**found, "rows": report(rows), "published": published_value(options, name, row)}


def published_value(options: argparse.Namespace, name: str, row: str) -> float | None:
    """The published perplexity of a set, if its rows are cut as released and of the scored part; else None."""
    corpus, part = find_corpus(name, options.part)
    if not options.released or part != corpus.scored:
        return None
    if name == "openwebtext":
        return published_text.VALIDATION.get(row)
    return published_text.ZERO_SHOT.get(row, {}).get(name)


class Scorer:
    """Scores rows of a set with a model.

    Args:
        model: A `DiffusionModel` in evaluation mode.
        tokenizer: Of the rows; None for rows of one length, such as images.
        options: With `mixing_ratio`, `nelbo_samples`, `batch_size` and `seed`.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, options: argparse.Namespace):
        self.model, self.options = model, options
        self.own = model.noise_process(options.mixing_ratio)
        self.fused = uses_fused_loss(model, None)
        candidates = (getattr(tokenizer, name, None) for name in ("pad_token_id", "eos_token_id"))
        pad = next((token_id for token_id in candidates if token_id is not None), 0)
        self.collate = DiffusionCollator(pad, num_classes=model.num_classes)

    def bound(self, rows: WrappedDataset) -> dict[str, float]:
        """The NELBO over (0, 1] as `XDLMTrainer` evaluates it, with the linear schedule (alpha from 1 to 0)."""
        return _figures(*self.bound_by_row(rows))

    def bound_by_row(self, rows: WrappedDataset) -> tuple[np.ndarray, np.ndarray]:
        """Nats of the bound and scored tokens of each row, both (R,) float64.

        Noise depends on seed and row alone, so that rows of two models can be compared one by one.
        """
        process, samples = self._process("linear"), self.options.nelbo_samples
        nats, tokens = np.zeros(len(rows)), np.zeros(len(rows))
        for indices, batch in self._batches(rows, range(len(rows)), f"{samples} times a row"):
            for sample in range(samples):
                z_t, t = evaluation_noise(
                    process, self.options.seed, batch["input_ids"], batch["noise_mask"], indices, sample, samples
                )
                nats[indices] += self._nats(process, {**batch, "z_t": z_t, "t": t}) / samples
            tokens[indices] = batch["token_weights"].sum(1).numpy()
        return nats, tokens

    def released(self, rows: WrappedDataset) -> dict[str, float]:
        """The released evaluation: one time per row in (eps, 1], stratified over a batch of rows in random order."""
        process, seed = self._process("loglinear"), self.options.seed
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(SHUFFLE_SEED)).tolist()
        nats, tokens = np.zeros(len(rows)), np.zeros(len(rows))
        for number, (indices, batch) in enumerate(self._batches(rows, order, "released times")):
            n = len(indices)
            uniform = torch.rand(n, generator=generator_of(seed, TRAIN_STEP, number), dtype=torch.float64)
            t = (1 - EPS) * ((uniform / n + torch.arange(n) / n) % 1) + EPS
            generators = [generator_of(seed, TRAIN_ROW, index) for index in indices]
            z_t = corrupt_rows(process, batch["input_ids"], batch["noise_mask"], t, generators)
            nats[indices] = self._nats(process, {**batch, "z_t": z_t, "t": t})
            tokens[indices] = batch["token_weights"].sum(1).numpy()
        return _figures(nats, tokens)

    def _process(self, schedule: str) -> NoiseProcess:
        """The model's noise with another schedule, or GIDD's unchanged."""
        if not self.model.stationary_noise:
            return self.own
        return self.model.noise_process(self.options.mixing_ratio, schedule)

    def _batches(
        self, rows: WrappedDataset, order: Sequence[int], what: str
    ) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
        size = self.options.batch_size
        for at in tqdm(range(0, len(order), size), desc=what, unit=" batches", leave=False):
            indices = list(order[at : at + size])
            yield indices, self.collate([rows[index] for index in indices])

    @torch.no_grad()
    def _nats(self, process: NoiseProcess, batch: dict[str, Tensor]) -> np.ndarray:
        """Loss of each row in nats, summed over its tokens."""
        batch = {name: x.to(self.model.device) for name, x in batch.items()}
        if "timesteps" in self.model.conditioning:
            batch["timesteps"] = self.model.timesteps(self._own_times(process, batch["t"]))
        _, losses = weighted_loss(self.model, process, batch, self.fused)
        return (batch["token_weights"] * losses).sum(1, dtype=torch.float64).cpu().numpy()

    def _own_times(self, process: NoiseProcess, t: Tensor) -> Tensor:
        """Times at which the noise of training has the signal rate of `process` at t."""
        if not isinstance(process, StationaryProcess):
            return t
        return self.own.schedule.inverse(process.alpha(t)).clamp(0, 1)


def _figures(nats: np.ndarray, tokens: np.ndarray) -> dict[str, float]:
    sums = ((x * y).sum() for x, y in ((nats, nats), (nats, tokens), (tokens, tokens)))
    return nelbo_of_sums(len(nats), float(nats.sum()), float(tokens.sum()), *map(float, sums))


def averages(sets: dict[str, dict[str, Any]], row: str) -> dict[str, Any]:
    """Mean perplexity of the seven zero-shot sets, with its standard error, and the published one if every set's is."""
    found: dict[str, Any] = {}
    for kind in ("bound", "released"):
        figures = [sets[name][kind] for name in ZERO_SHOT]
        found[kind] = {"perplexity": sum(each["perplexity"] for each in figures) / len(figures)}
        errors = [each.get("perplexity_standard_error", math.nan) for each in figures]
        if not any(map(math.isnan, errors)):
            found[kind]["perplexity_standard_error"] = math.hypot(*errors) / len(errors)
    comparable = all(sets[name]["published"] is not None for name in ZERO_SHOT)
    return {**found, "published": published_text.ZERO_SHOT[row]["average"] if comparable else None}


# --------------------------------------------------------------------------------------------------------------------
# The report


def markdown(found: dict[str, Any]) -> str:
    """The report as a table."""
    lines = [
        f"{found['model']}: {found['row']}, rows of {found['length']} tokens cut {found['rows_cut']}; bound: "
        f"{found['nelbo_samples']} times a row, released: one. ± is one standard error over rows.",
        "",
        "| set | rows | perplexity, bound | perplexity, released protocol | published |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for name, values in found["sets"].items():
        lines.append(_line(name, str(values["rows"]["rows"]), values))
    if "zero_shot_average" in found:
        lines.append(_line("zero-shot average", "", found["zero_shot_average"]))
    return "\n".join(lines)


def _line(name: str, rows: str, values: dict[str, Any]) -> str:
    ours = [value_with_error(values[kind], "perplexity", 3) for kind in ("bound", "released")]
    published = "-" if values["published"] is None else f"{values['published']:.3f}"
    return "| " + " | ".join([name, rows, *ours, published]) + " |"


if __name__ == "__main__":
    main()
