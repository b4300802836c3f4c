"""The lm-eval model `xdlm-oracle`: gives the benchmark's own solutions as answers, to test the scoring.

    xdlm-eval --model xdlm-oracle --tasks xdlm_table16 --confirm_run_unsafe_code

must score 1 on every task under `--metadata protocol=lenient`, and 0 with `--model_args corrupt=True`. Under
`opencompass` some right answers are counted wrong (docs/evaluation.md lists how many).
"""

import re
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model

from xdlm_hf.evaluation.opencompass import BBH_FREE_FORM


def gold(task: str, doc: dict[str, Any]) -> str:
    """The right answer to a row in the form of the task's shots, and the start of a continuation to be cut off."""
    if task == "xdlm_gsm8k":
        number = doc["answer"].partition("#### ")[2].replace(",", "")
        return f"\n{doc['answer']}\nThe answer is {number}\n\nQuestion: What is 9 + 9?"
    if task in ("xdlm_math", "xdlm_math500"):
        solution = doc["solution"]
        if doc["protocol"] == "opencompass":  # math-verify cannot read the end of some original solutions
            solution = f"The final answer is ${doc['answer']}$. I hope it is correct."
        return f"{solution}\n\nProblem:\nWhat is $9 + 9$?"
    if task.startswith("xdlm_bbh"):
        more = "Q: And now?\nOptions:\n(A) this\n(Z) that\nA: Let's think step by step. So the answer is (Z)."
        return f" Let us see. So the answer is {doc['target']}.\n\n{more}"
    if task.startswith("xdlm_humaneval"):
        return doc["canonical_solution"] + "\n\nprint('more')\n"
    if task.startswith("xdlm_mbpp"):
        return f" '{doc['code']}' \n[DONE] \n\n You are an expert"
    if task == "xdlm_last_word":
        return f" {doc['word']}"
    raise ValueError(f"xdlm-oracle has no solutions of the task {task!r}: it answers this package's own tasks")


def corrupted(task: str, doc: dict[str, Any]) -> str:
    """As `gold`, but wrong."""
    if task == "xdlm_gsm8k":
        return re.sub(r"\d+", lambda number: number.group() + "1", gold(task, doc))
    if task in ("xdlm_math", "xdlm_math500"):
        return f"\nThe final answer is $\\boxed{{{doc['answer']} + 1}}$. I hope it is correct."
    if task.startswith("xdlm_bbh"):
        target = doc["target"]
        if doc["subtask"] in BBH_FREE_FORM:
            return f" So the answer is {target} not."
        letter = re.fullmatch(r"\(([A-Z])\)", target)  # a few targets of multiple choice are no letters
        return f" So the answer is ({chr(ord(letter[1]) + 1) if letter else 'Z'})."
    if task.startswith("xdlm_humaneval"):
        return "    return NotImplemented\n"
    if task.startswith("xdlm_mbpp"):
        wrong = "".join(f'\ndef {name}(*args, **kwargs):\n    return "no"\n' for name in doc["names"])
        return f"{doc['code']}\n{wrong}[DONE]"
    return f" un{doc['word']}"


@register_model("xdlm-oracle")
class OracleModel(LM):
    """Gold answers, or wrong ones with `corrupt=True`; lm-eval's batch size and device are ignored."""

    def __init__(self, corrupt: bool = False, batch_size: Any = None, max_batch_size: Any = None, device: Any = None):
        super().__init__()
        self.answer = corrupted if corrupt else gold

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        answers = []
        for request in requests:
            answer = self.answer(request.task_name, request.doc)
            for stop in request.args[1]["until"]:
                answer = answer.split(stop)[0]
            answers.append(answer)
        return answers

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        raise ValueError("xdlm-oracle has no likelihoods: choose tasks with output_type generate_until")

    loglikelihood_rolling = loglikelihood
