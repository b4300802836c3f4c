"""Scores that another device would report: every answer again with perturbed logits, and an interval for the score.

In bfloat16 the confidences of two tokens often nearly tie, so another GPU or batch shape gives other greedy answers.
`stability=R` repeats every item R times, each time with the rounding of another simulated device (perturbation.py). Let
s_ri be the score of item i in repetition r, and n the number of items. For a metric that is the mean over the items,
and items that vary independently of each other, the score of one repetition has the mean and variance

    M = 1/n sum_i p_i,                   p_i estimated by 1/R sum_r s_ri
    V = 1/n^2 sum_i v_i,                 v_i estimated by 1/(R-1) sum_r (s_ri - p_i)^2

For right and wrong answers the estimate of v_i is R/(R-1) p_i (1 - p_i), which is unbiased. The score of a new
repetition and the estimate of M are independent, so their difference has the variance V + V/R, and

    M +- z sqrt((1 + 1/R) V),            z = 1.96, the 97.5 % quantile of the normal distribution

contains the score of a new repetition with probability 0.95. The items are given; for other items of the same kind
there is lm-eval's standard error. For any other aggregate, such as a group's, V is the variance of its R values, and z
the quantile of Student's t with R - 1 degrees of freedom.

lm-eval has no hook for this, so `install` replaces its `evaluate` by the function below.
"""

import copy
import logging
import math
from collections.abc import Mapping, Sequence
from statistics import NormalDist, fmean
from typing import Any

import numpy as np
from lm_eval import evaluator
from lm_eval.api.instance import Instance
from lm_eval.api.task import Task
from scipy.stats import t as student

from xdlm_hf.evaluation.generation_requests import PERTURBATION

logger = logging.getLogger(__name__)

CONFIDENCE = 0.95
_evaluate = evaluator.evaluate


def install() -> None:
    """Makes lm-eval repeat the answers of models that ask for it; for other models nothing changes."""
    evaluator.evaluate = evaluate


def evaluate(lm: Any, task_dict: Mapping[str, Any], **options: Any) -> dict[str, Any] | None:
    """lm-eval's `evaluate`, followed by the repetitions that the model's `stability` asks for.

    Every repetition is a whole run with requests of its own, so that lm-eval's cache resumes it and its tasks score it.

    Args:
        lm: The model, possibly behind lm-eval's cache.
        task_dict: As `TaskManager.load` returns it.
        options: The other arguments of lm-eval's `evaluate`.

    Returns:
        Its results with `stability` (`report`), some of it also among the metrics; None in processes but the first.

    Raises:
        ValueError: If a task scores likelihoods.
    """
    arguments = getattr(lm, "arguments", None)
    count = getattr(arguments, "stability", None)
    if count is None:
        return _evaluate(lm=lm, task_dict=task_dict, **options)
    refuse_likelihoods(task_dict["tasks"])
    shots = _randomness_of_shots(task_dict["tasks"].values())
    results = _evaluate(lm=lm, task_dict=task_dict, **{**options, "log_samples": True})
    quiet = {"log_samples": True, "bootstrap_iters": 0, "write_out": False}
    repetitions = []
    for number in range(1, count + 1):
        logger.info("stability: repetition %d of %d with perturbed logits", number, count)
        for holder, name, value in shots:
            setattr(holder, name, copy.deepcopy(value))
        perturbed = _PerturbedModel(lm, {"repetition": number, "noise": arguments.stability_noise})
        repetitions.append(_evaluate(lm=perturbed, task_dict=task_dict, **{**options, **quiet}))
    if results is None:
        return None
    add_report(results, repetitions, arguments.stability_noise)
    if not options.get("log_samples", True):
        del results["samples"]
    return results


def refuse_likelihoods(tasks: Mapping[str, Task]) -> None:
    """Raises ValueError for tasks that score likelihoods, which `stability` does not repeat."""
    scored = [name for name, task in tasks.items() if task.OUTPUT_TYPE != "generate_until"]
    if scored:
        raise ValueError(
            f"stability repeats generated answers only, and {', '.join(scored)} scores likelihoods: leave out "
            "stability, or run these tasks apart"
        )


class _PerturbedModel:
    """A model whose generated answers are all perturbed; everything else is the model's."""

    def __init__(self, lm: Any, perturbation: dict[str, Any]):
        self.lm, self.perturbation = lm, perturbation

    def __getattr__(self, name: str) -> Any:
        return getattr(self.lm, name)

    def generate_until(self, requests: list[Instance]) -> list[str]:
        # lm-eval's cache is keyed by the arguments, so each repetition has entries of its own.
        return self.lm.generate_until([self._perturbed(request) for request in requests])

    def _perturbed(self, request: Instance) -> Instance:
        context, settings = request.args
        arguments = (context, {**settings, PERTURBATION: self.perturbation})
        return Instance(request.request_type, request.doc, arguments, request.idx, request.metadata)


def _randomness_of_shots(tasks: Any) -> list[tuple[Any, str, Any]]:
    """State of the random numbers that choose few-shot examples: owner, attribute, value."""
    owners = [(task, "fewshot_rnd") for task in tasks]
    owners += [(task.sampler, "rnd") for task in tasks if hasattr(task, "sampler")]
    return [(owner, name, copy.deepcopy(getattr(owner, name, None))) for owner, name in owners]


def add_report(results: dict[str, Any], repetitions: Sequence[Mapping[str, Any]], noise: float) -> None:
    """Adds `stability` to the results, and four rows per metric to those of tasks and groups, which lm-eval prints.

    Samples get `perturbed_scores`: their scores in the repetitions, by metric.
    """
    tasks = {name: _task_report(name, results, repetitions) for name in results["samples"]}
    groups = {
        name: {
            key: run_statistics(score, [one["groups"][name][key] for one in repetitions])
            for key, score in _scores(group)
        }
        for name, group in results.get("groups", {}).items()
    }
    for name, metrics in (tasks | groups).items():
        for part in (results["results"], results.get("groups", {})):
            if name in part:
                part[name] |= _rows(metrics)
    changed = {name: _share_changed(group, repetitions, name) for name, group in results["samples"].items()}
    results["stability"] = {
        "repetitions": len(repetitions),
        "noise": noise,
        "confidence": CONFIDENCE,
        "answers_changed": changed,
        "tasks": tasks,
        "groups": groups,
    }


def item_statistics(base: Sequence[float], repetitions: Sequence[Sequence[float]]) -> dict[str, Any]:
    """Score, flips and interval of a metric that is the mean over its items; formulas in the module's docstring.

    Args:
        base: Scores of the n items without perturbation.
        repetitions: The same of each repetition, (R, n), R >= 2.

    Returns:
        `score`, of the unperturbed run; `perturbed`, M; `interval`; `deviation`, the root of V; `flip_rate`, the share
        of the n R perturbed scores that differ from the unperturbed one; `items_flipped`, the share of items for which
        at least one does; `scores` of the repetitions.
    """
    first, perturbed = np.asarray(base, dtype=np.float64), np.asarray(repetitions, dtype=np.float64)
    spread = perturbed.var(axis=0, ddof=1).sum() / len(first) ** 2
    flips = perturbed != first
    scores = perturbed.mean(axis=1).tolist()
    return {
        **_prediction(float(first.mean()), scores, spread, NormalDist().inv_cdf((1 + CONFIDENCE) / 2)),
        "flip_rate": float(flips.mean()),
        "items_flipped": float(flips.any(axis=0).mean()),
        "scores": scores,
    }


def run_statistics(base: float, scores: Sequence[float]) -> dict[str, Any]:
    """The same of any aggregate, from its values in the repetitions alone, without flips."""
    quantile = student.ppf((1 + CONFIDENCE) / 2, len(scores) - 1)
    return {**_prediction(base, scores, float(np.var(scores, ddof=1)), float(quantile)), "scores": list(scores)}


def _prediction(base: float, scores: Sequence[float], spread: float, quantile: float) -> dict[str, Any]:
    """Score and interval; `spread` is V, the variance of the score of one repetition."""
    mean, half = fmean(scores), quantile * math.sqrt((1 + 1 / len(scores)) * spread)
    return {"score": base, "perturbed": mean, "interval": [mean - half, mean + half], "deviation": math.sqrt(spread)}


def _task_report(
    name: str, results: Mapping[str, Any], repetitions: Sequence[Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Statistics of each metric of a task, by lm-eval's `metric,filter`; its samples get `perturbed_scores`."""
    base, others = _items(results["samples"][name]), [_items(one["samples"][name]) for one in repetitions]
    report = {}
    for key, score in _scores(results["results"][name]):
        items, columns = list(base[key].values()), [list(other.get(key, {}).values()) for other in others]
        complete = all(len(column) == len(items) for column in columns)  # a scorer may leave out items
        numbers = all(_is_number(value) for values in (items, *columns) for value in values)
        if complete and numbers and math.isclose(fmean(items), score, abs_tol=1e-12):
            report[key] = item_statistics(items, columns)
        else:  # the metric is not a mean over the same items
            report[key] = run_statistics(score, [one["results"][name][key] for one in repetitions])
    for sample in results["samples"][name]:
        sample["perturbed_scores"] = {
            metric: [other.get(f"{metric},{sample['filter']}", {}).get(sample["doc_id"]) for other in others]
            for metric in sample["metrics"]
        }
    return report


def _items(samples: list[dict[str, Any]]) -> dict[str, dict[int, Any]]:
    """Values of each metric by row, in the order of the rows."""
    values: dict[str, dict[int, Any]] = {}
    for sample in sorted(samples, key=lambda sample: sample["doc_id"]):
        for metric in sample["metrics"]:
            values.setdefault(f"{metric},{sample['filter']}", {})[sample["doc_id"]] = sample[metric]
    return values


def _scores(results: Mapping[str, Any]) -> list[tuple[str, float]]:
    """The scores among the results of a task or group, which also hold its name, size and standard errors."""
    named = [(key, value) for key, value in results.items() if "," in key and "_stderr," not in key]
    return [(key, value) for key, value in named if _is_number(value)]


def _rows(metrics: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Rows of lm-eval's table."""
    rows = {}
    for key, found in metrics.items():
        metric, _, name = key.partition(",")
        low, high = found["interval"]
        values = {"perturbed": found["perturbed"], "interval_low": low, "interval_high": high}
        if "flip_rate" in found:
            values["flip_rate"] = found["flip_rate"]
        rows |= {f"{metric}_{part},{name}": value for part, value in values.items()}
    return rows


def _share_changed(samples: list[dict[str, Any]], repetitions: Sequence[Mapping[str, Any]], name: str) -> float:
    """Share of perturbed answers whose text differs, right or wrong."""
    texts = {sample["doc_id"]: sample["resps"] for sample in samples}
    return fmean(sample["resps"] != texts[sample["doc_id"]] for one in repetitions for sample in one["samples"][name])


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
