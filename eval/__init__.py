"""Scoring: lm-evaluation-harness (model adapter, command line, tasks, sandbox), perplexities of text, FID of images.

cli                    `xdlm-eval`: lm-eval's command line with checks before the model is loaded
arguments              arguments of the model, checked without its weights
adapter                the lm-eval model `xdlm`
checkpoint             model, tokenizer and padding
batches                sizes of batches
generation_requests    generated answers
perturbation           noise on the logits in place of another device's rounding
stability              repetitions with such noise, and the interval of their score
likelihood_requests    likelihood bounds in batches
likelihood             Monte Carlo estimate of the bound (Eq. 15)
distributed            collective operations between processes
protocols              rules for prompts, stops, extraction and equality
opencompass            OpenCompass's rules
rows                   rows of the tasks from local files or the Hub
tasks                  task files of the benchmarks
equality               equality of LaTeX answers, with a time limit
sandbox                runs programs that a model wrote
judge                  the processes inside the sandbox
confinement            restrictions that these processes put on themselves
values                 values as plain data, between these processes
evalplus               EvalPlus's comparison of outputs
oracle                 the lm-eval model `xdlm-oracle`, which gives the benchmarks' own answers
manifest               commits, hashes and hardware, for the results
table16                reproduces the paper's Table 16, cell by cell
published              the published scores of Table 16
rescore                scores stored answers by another protocol
perplexity             `xdlm-perplexity`: validation and zero-shot sets
generative_perplexity  `xdlm-gen-ppl`: samples for several numbers of steps, scored by a judge
text_models            options, loading and description of a model for these commands
text_judges            judges of generated text: causal or n-gram language models
ngram                  n-gram model with Witten-Bell smoothing
published_text         the published text results
fid                    `xdlm-fid`: FID and Inception Score of images for several numbers of steps
image_features         their feature extractors, and statistics of reference sets
published_images       the published image results
text_figures           the paper's text figures, from reports of these commands

This folder is installed as `xdlm_hf.evaluation` (`package_dir` in setup.cfg), so that adapter and task files stay
together and no package named `eval` reaches site-packages. Modules here import each other by the installed name: a
script started as `python -m eval.<name>` then registers the adapter once, not under two module names.

Importing this package needs nothing beyond the standard library; `xdlm_hf.evaluation.adapter` needs the extra `eval`.
"""

from pathlib import Path

TASKS = Path(__file__).resolve().parent / "tasks"
"""Folder with the task files, for lm-eval's `include_path`."""
