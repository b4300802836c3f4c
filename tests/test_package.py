"""What a release holds: commands, metadata, and the files of the wheel and of the source distribution."""

import configparser
import email
import importlib
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import xdlm_hf

ROOT = Path(__file__).resolve().parent.parent
SETUP = configparser.ConfigParser()
SETUP.read(ROOT / "setup.cfg")
COMMANDS = dict(
    line.split(" = ") for line in SETUP["options.entry_points"]["console_scripts"].splitlines() if " = " in line
)
SOURCES = ("benchmarks", "docs", "eval", "examples", "recipes", "tests", "xdlm_hf", ".ci")
BUILD = "from setuptools import build_meta; build_meta.build_sdist('dist'); build_meta.build_wheel('dist')"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_prints_its_version(command, monkeypatch, capsys):
    module, function = COMMANDS[command].split(":")
    monkeypatch.setattr(sys, "argv", [command, "--version"])
    with pytest.raises(SystemExit) as ended:
        getattr(importlib.import_module(module), function)()
    assert not ended.value.code and capsys.readouterr().out.strip() == f"{command} {xdlm_hf.__version__}"


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Folder of the wheel and the source distribution, built from a copy of the tracked files and new ones."""
    pytest.importorskip("setuptools", minversion="77", reason="pyproject.toml needs setuptools 77 to build")
    copy = tmp_path_factory.mktemp("source")
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for folder in SOURCES:
        shutil.copytree(ROOT / folder, copy / folder, ignore=ignored)
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, copy)
    run = subprocess.run([sys.executable, "-c", BUILD], cwd=copy, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return copy / "dist"


def test_the_wheel_holds_the_package_alone_and_its_data(built):
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        names = set(wheel.namelist())
        metadata = email.message_from_bytes(wheel.read(next(n for n in names if n.endswith("/METADATA"))))
    info = f"xdlm_hf-{xdlm_hf.__version__}.dist-info"
    assert {name.split("/")[0] for name in names} == {"xdlm_hf", info}
    library = {path.relative_to(ROOT).as_posix() for path in (ROOT / "xdlm_hf").rglob("*.py")}
    evaluation = {f"xdlm_hf/evaluation/{path.relative_to(ROOT / 'eval')}" for path in (ROOT / "eval").rglob("*.*")}
    evaluation = {name for name in evaluation if "__pycache__" not in name}
    pages = {path for path in (ROOT / "xdlm_hf").rglob("*.*") if path.suffix in (".html", ".css", ".js")}
    assert {path.parent.name for path in pages} == {"serving", "watch"}
    data = {path.relative_to(ROOT).as_posix() for path in pages} | {"xdlm_hf/py.typed"}
    assert {name for name in names if name.startswith("xdlm_hf/")} == library | evaluation | data
    assert metadata["Version"] == xdlm_hf.__version__ and metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Author"] == "The xdlm_hf contributors" and "Typing :: Typed" in metadata.get_all("Classifier")
    assert all(" https://" in url for url in metadata.get_all("Project-URL"))
    assert metadata["Description-Content-Type"] == "text/markdown" and "# xdlm_hf" in metadata.get_payload()


def test_the_source_distribution_holds_what_its_tests_need(built):
    with tarfile.open(next(built.glob("*.tar.gz"))) as source:
        names = {name.partition("/")[2] for name in source.getnames()}
    there = {
        path.relative_to(ROOT).as_posix()
        for folder in SOURCES
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".pyc"
    }
    assert not there - names
    assert {"CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "LICENSE", "Makefile", "README.md", "setup.cfg"} <= names
