"""Record the loss trajectories that test_committed_trajectory compares with; refuses an unclean tree."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from training import losses, trainer  # noqa: E402

SHARED = {"max_steps": 16, "adam_epsilon": 1e-8}  # the optimizer as it is by default
RUNS = {
    "mdlm": {**SHARED, "mixing_ratio": 0.0},
    "xdlm": {**SHARED, "mixing_ratio": 0.1, "time_sampling": "stratified"},
    "udlm": {**SHARED, "mixing_ratio": 1.0, "noise_schedule": "cosine"},
}


def main():
    changed = subprocess.run(
        ["git", "status", "--porcelain", "--untracked-files=no"], cwd=HERE, capture_output=True, text=True, check=True
    ).stdout
    if changed:
        raise SystemExit(f"commit or discard these changes first:\n{changed}")
    recorded = {}
    for name, options in RUNS.items():
        with tempfile.TemporaryDirectory() as folder:
            run = trainer(folder, train_rows=18, **options)
            run.train()
        recorded[name] = {"options": options, "losses": losses(run)}
    path = HERE / "tiny_trajectory.json"
    path.write_text(json.dumps(recorded, indent=1) + "\n")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
