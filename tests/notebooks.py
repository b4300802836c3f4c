"""Reading and running the notebooks of examples/."""

import json
from pathlib import Path

NOTEBOOKS = sorted((Path(__file__).resolve().parent.parent / "examples").glob("*.ipynb"))
GENERATE = next(path for path in NOTEBOOKS if path.name == "generate.ipynb")


def cells(notebook, kind="code"):
    content = json.loads(notebook.read_text(encoding="utf-8"))
    assert (content["nbformat"], content["nbformat_minor"]) == (4, 5)
    return [cell for cell in content["cells"] if cell["cell_type"] == kind]


def run(notebook):
    """The names that the cells define, run one after the other as a kernel does, without the notebook's libraries."""
    names = {"__name__": "__main__"}
    for n, cell in enumerate(cells(notebook)):
        exec(compile("".join(cell["source"]), f"{notebook.name}, code cell {n}", "exec"), names)
    return names
