"""The documentation: its pages are in the navigation, the reference has every public name, its examples run."""

import re
from pathlib import Path

import yaml
from models import model_of, save_checkpoint

import xdlm_hf
from xdlm_hf.data.tokenizer import train_tokenizer

ROOT = Path(__file__).parents[1]


def test_every_page_is_in_the_navigation():
    def pages(entries):
        for entry in entries:
            (target,) = entry.values()
            yield from pages(target) if isinstance(target, list) else [target]

    listed = list(pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]))
    there = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    assert len(listed) == len(set(listed)) and set(listed) == there | {"benchmarks/README.md"}


def test_the_reference_has_every_public_name():
    entries = [
        entry
        for page in (ROOT / "docs" / "api").glob("*.md")
        for entry in re.findall(r"^::: (\S+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    ]
    assert len(entries) == len(set(entries))
    assert set(xdlm_hf.__all__) <= {entry.rpartition(".")[2] for entry in entries}


def test_how_to_add_names_files_that_are_there():
    named = re.findall(r"`((?:xdlm_hf|tests|eval|docs)/[\w/]+\.\w+)`", (ROOT / "docs" / "adding.md").read_text())
    named = [path for path in named if "NAME" not in path]
    assert len(named) > 15 and not [path for path in named if not (ROOT / path).is_file()]


def test_getting_started_runs_as_it_stands(tmp_path, monkeypatch, capsys):
    tokenizer = train_tokenizer(["The capital of France is Paris."], vocab_size=270)
    save_checkpoint(tmp_path, model_of(tokenizer), tokenizer)
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs" / "getting-started.md").read_text(encoding="utf-8")
    first, *others = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert first.count("GSAI-ML/LLaDA-8B-Base") == 2 and others
    names = {}
    exec(first.replace("GSAI-ML/LLaDA-8B-Base", str(tmp_path)), names)
    for example in others:
        exec(example, names)
    assert "The capital of France is" in capsys.readouterr().out
    assert (tmp_path / "trace.html").read_text().startswith("<!DOCTYPE html>")
