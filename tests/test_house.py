"""Rules of the house that a reader would otherwise have to check by hand (CONTRIBUTING.md states them)."""

import ast
import configparser
import re
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import xdlm_hf
from xdlm_hf.data import train_tokenizer

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")

# A module may import from its own layer and from those above it in this list, never from below.
LAYERS = [
    ["schedules"],
    ["kernel"],
    ["posterior", "losses", "refinement"],
    ["samplers"],
    ["cache", "spans"],
    ["denoising"],
    ["released"],
    ["generation_config"],
    ["configuration_llada", "modeling_llada", "generation", "hub"],
    ["preemption", "checksums", "data", "precision"],
    ["source_files"],
    ["adapters", "checkpoints", "processes", "training_metrics", "display"],
    ["planning", "stream", "conversations", "revisions", "streamers", "trace", "loading"],
    ["trainer", "storage", "serving_fields", "serving_answers"],
    ["serving_prompts"],
    ["serving_requests"],
    ["serving_engine"],
    ["serving_app"],
    ["serving", "chat"],
]
CORE = [module for layer in LAYERS[:3] for module in layer]
LIBRARY = sorted((ROOT / "xdlm_hf").glob("*.py"))
SHIPPED = LIBRARY + [
    path for folder in ("eval", "recipes", "benchmarks") for path in sorted((ROOT / folder).rglob("*.py"))
]


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports(path: Path) -> list[str]:
    """Every module a file imports, at any depth; siblings as `xdlm_hf.<name>`, however they are written."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = ".".join(filter(None, ["xdlm_hf" if node.level else "", node.module]))
            # `from . import kernel` and `from xdlm_hf import kernel` name modules, not only objects.
            found += [f"{module}.{alias.name}" for alias in node.names] if module == "xdlm_hf" else [module]
    return found


def siblings(path: Path) -> set[str]:
    return {name.split(".")[1] for name in imports(path) if name.startswith("xdlm_hf.")}


def test_the_checks_see_files_and_imports():
    # Guards the guards: a moved folder or a changed parser must not make the tests below pass on nothing.
    assert {"xdlm_hf/kernel.py", "eval/adapter.py"} <= {relative(path) for path in SHIPPED}
    assert {"kernel"} <= siblings(ROOT / "xdlm_hf" / "posterior.py")
    assert "torch" in imports(ROOT / "xdlm_hf" / "schedules.py")


def test_every_module_has_a_layer():
    modules = {path.stem for path in LIBRARY} - {"__init__"}
    assert modules == {module for layer in LAYERS for module in layer}


@pytest.mark.parametrize("path", [p for p in LIBRARY if p.stem != "__init__"], ids=lambda p: p.stem)
def test_imports_point_one_way(path):
    depth = {module: i for i, layer in enumerate(LAYERS) for module in layer}
    # An unknown sibling (the package's own root, the evaluation) counts as lying below everything.
    below = {name for name in siblings(path) if depth.get(name, len(LAYERS)) > depth[path.stem]}
    assert not below, f"{path.stem} imports {sorted(below)}, which lie below it"


def test_imports_make_no_cycle():
    TopologicalSorter({path.stem: siblings(path) for path in LIBRARY if path.stem != "__init__"}).prepare()


@pytest.mark.parametrize("module", CORE)
def test_core_needs_nothing_but_torch(module):
    top_level = {name.split(".")[0] for name in imports(ROOT / "xdlm_hf" / f"{module}.py")}
    assert top_level - sys.stdlib_module_names <= {"torch", "xdlm_hf"}


@pytest.mark.parametrize("path", SHIPPED, ids=relative)
def test_no_remote_code_and_no_pickle(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
            assert isinstance(node.value, ast.Constant) and node.value.value is False, f"line {node.lineno}"
        if isinstance(node, ast.Attribute) and node.attr == "load" and isinstance(node.value, ast.Name):
            assert node.value.id != "torch", f"line {node.lineno}: torch.load reads pickles; use safetensors"
    assert not {"pickle", "dill", "cloudpickle"} & {name.split(".")[0] for name in imports(path)}


@pytest.mark.parametrize("path", SHIPPED, ids=relative)
def test_functions_fit_on_a_screen(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef):
            docstring = len((ast.get_docstring(node, clean=False) or "").splitlines())
            length = node.end_lineno - node.lineno + 1 - docstring
            assert length <= 60, f"{node.name}, line {node.lineno}: {length} lines without its docstring"


def test_public_names_have_docstrings():
    missing = [name for name in xdlm_hf.__all__ if not getattr(getattr(xdlm_hf, name), "__doc__", None)]
    assert not missing


def test_version_is_one_literal():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    assert config["metadata"]["version"] == "attr: xdlm_hf.__version__"
    # Read as setuptools does: without importing the package, hence without torch.
    init = ast.parse((ROOT / "xdlm_hf" / "__init__.py").read_text(encoding="utf-8"))
    assignments = [node for node in init.body if isinstance(node, ast.Assign)]
    literals = [node.value.value for node in assignments if ast.unparse(node.targets[0]) == "__version__"]
    assert literals == [xdlm_hf.__version__]
    assert re.fullmatch(r"\d+\.\d+\.\d+(\.dev\d+)?", xdlm_hf.__version__)


def test_nothing_named_eval_is_installed():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    packages = config["options"]["packages"].split()
    assert all(package.split(".")[0] == "xdlm_hf" for package in packages)
    assert config["options"]["package_dir"].split("=")[0].strip() == "xdlm_hf.evaluation"


def test_readme_names_both_commands():
    assert "make demo" in README and "make test" in README


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md"])
def test_links_lead_somewhere(document):
    targets = re.findall(r"\]\((?!https?://)([^)#]+)", (ROOT / document).read_text(encoding="utf-8"))
    assert not [target for target in targets if not (ROOT / target).exists()]


def test_readme_examples_run_as_they_stand(tmp_path, capsys):
    tokenizer = train_tokenizer(["The capital of France is Paris. def fibonacci(n): return n"], vocab_size=270)
    ids = {name: getattr(tokenizer, name) for name in ("mask_token_id", "eos_token_id", "pad_token_id")}
    config = xdlm_hf.LLaDAConfig(
        d_model=32, n_heads=2, n_layers=1, mlp_hidden_size=64, vocab_size=len(tokenizer), **ids
    )
    xdlm_hf.LLaDAForDiffusionLM(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    first, *others = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert first.count("GSAI-ML/LLaDA-8B-Base") == 2 and others
    names = {}
    exec(first.replace("GSAI-ML/LLaDA-8B-Base", str(tmp_path)), names)
    printed = ast.literal_eval(capsys.readouterr().out.splitlines()[-1])  # DeepSpeed may log to stdout before
    assert len(printed) == 2 and printed[0].startswith("The capital of France is")
    for example in others:
        exec(example, names)


def test_readme_map_has_one_line_per_file():
    mapped = re.findall(r"^- `([^`]+\.py)`: \S", README, flags=re.MULTILINE)
    assert len(mapped) == len(set(mapped)), "a file is listed twice"
    listed = set(mapped)
    files = {relative(path) for path in SHIPPED}
    assert not files - listed, "not in README's map"
    assert not {name for name in listed if not (ROOT / name).is_file()}, "in README's map, but not there"


def test_ci_runs_what_the_readme_says():
    assert re.search(r"\bmake test\b", (ROOT / ".ci" / "run").read_text(encoding="utf-8"))
