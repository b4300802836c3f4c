"""Scoring with lm-evaluation-harness: the model adapter, the command line and the tasks.

This folder is installed as `xdlm_hf.evaluation` (`package_dir` in setup.cfg). Mapping it is simpler than splitting
it: adapter and task files stay together in a wheel as in a checkout, an editable install follows edits, and no
package named `eval` reaches site-packages. Modules here import each other by the installed name, so that a script
started as `python -m eval.<name>` registers the adapter once, not under two module names.

Importing this package needs nothing beyond the standard library; `xdlm_hf.evaluation.adapter` needs the extra `eval`.
"""

from pathlib import Path

TASKS = Path(__file__).resolve().parent / "tasks"
"""Folder with the task files, for lm-eval's `include_path`."""
