"""Scoring with lm-evaluation-harness: the model adapter, the command line, the tasks and the sandbox.

cli                   `xdlm-eval`: lm-eval's command line with checks before the model is loaded
arguments             arguments of the model, checked without its weights
adapter               the lm-eval model `xdlm`
checkpoint            model, tokenizer and padding
batches               sizes of batches
generation_requests   generated answers
likelihood_requests   likelihood bounds in batches
likelihood            Monte Carlo estimate of the bound (Eq. 15)
distributed           collective operations between processes
protocols             rules for prompts, stops, extraction and equality
opencompass           OpenCompass's rules
rows                  rows of the tasks from local files or the Hub
tasks                 task files of the benchmarks
equality              equality of LaTeX answers, with a time limit
sandbox               runs programs that a model wrote
judge                 the processes inside the sandbox
confinement           restrictions that these processes put on themselves
values                values as plain data, between these processes
evalplus              EvalPlus's comparison of outputs
oracle                the lm-eval model `xdlm-oracle`, which gives the benchmarks' own answers
manifest              commits, hashes and hardware, for the results
table16               reproduces the paper's Table 16, cell by cell
published             the published scores of Table 16
rescore               scores stored answers by another protocol

This folder is installed as `xdlm_hf.evaluation` (`package_dir` in setup.cfg), so that adapter and task files stay
together and no package named `eval` reaches site-packages. Modules here import each other by the installed name: a
script started as `python -m eval.<name>` then registers the adapter once, not under two module names.

Importing this package needs nothing beyond the standard library; `xdlm_hf.evaluation.adapter` needs the extra `eval`.
"""

from pathlib import Path

TASKS = Path(__file__).resolve().parent / "tasks"
"""Folder with the task files, for lm-eval's `include_path`."""
