"""Rules of the house that a reader would otherwise have to check by hand (CONTRIBUTING.md states them)."""

import ast
import configparser
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from importlib.util import resolve_name
from pathlib import Path

import pytest

import xdlm_hf
from xdlm_hf.data.tokenizer import train_tokenizer

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")

# What a package, or a module beside the packages, may import from besides itself.
MAY_IMPORT = {
    "diffusion": set(),
    "generation": {"diffusion"},
    "models": {"diffusion", "generation"},
    "data": set(),
    "training": {"diffusion", "generation", "models", "data"},
    "watch": set(),
    "loading": {"data", "models"},
    "serving": {"generation", "data", "watch", "loading"},
    "hub": {"diffusion", "generation", "models"},
    "convert": {"models"},
}
LIBRARY = sorted((ROOT / "xdlm_hf").rglob("*.py"))
MODULES = [path for path in LIBRARY if path.stem != "__init__"]
PACKAGES = sorted(path.parent for path in LIBRARY if path.stem == "__init__" and path.parent.name != "xdlm_hf")
SHIPPED = LIBRARY + [
    path for folder in ("eval", "recipes", "benchmarks") for path in sorted((ROOT / folder).rglob("*.py"))
]


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def imports(path: Path) -> list[str]:
    """Every module a file imports, at any depth, by its whole name."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            package = module_name(path).rpartition(".")[0]
            module = resolve_name("." * node.level + (node.module or ""), package) if node.level else node.module
            # `from . import noise` names modules, not only objects.
            found += [f"{module}.{a.name}" if f"{module}.{a.name}" in NAMES else module for a in node.names]
    return found


NAMES = {module_name(path) for path in MODULES}


def siblings(path: Path) -> set[str]:
    return {name for name in imports(path) if name.startswith("xdlm_hf")}


def test_the_checks_see_files_and_imports():
    # Guards the guards: a moved folder or a changed parser must not make the tests below pass on nothing.
    assert {"xdlm_hf/diffusion/noise.py", "eval/adapter.py"} <= {relative(path) for path in SHIPPED}
    assert "xdlm_hf.diffusion.noise" in siblings(ROOT / "xdlm_hf" / "diffusion" / "reverse.py")
    assert "xdlm_hf.generation.cache" in siblings(ROOT / "xdlm_hf" / "models" / "llada" / "modeling_llada.py")
    assert "torch" in imports(ROOT / "xdlm_hf" / "diffusion" / "schedules.py")


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_imports_point_one_way(path):
    place = path.relative_to(ROOT / "xdlm_hf").parts[0].removesuffix(".py")
    # The package's own root and the evaluation count as lying below everything.
    others = {(name.split(".") + ["xdlm_hf"])[1] for name in siblings(path)} - {place}
    assert others <= MAY_IMPORT[place], f"{relative(path)} imports from {sorted(others - MAY_IMPORT[place])}"


def test_imports_make_no_cycle():
    TopologicalSorter({module_name(path): siblings(path) for path in MODULES}).prepare()


@pytest.mark.parametrize("path", sorted((ROOT / "xdlm_hf" / "diffusion").rglob("*.py")), ids=relative)
def test_the_mathematics_needs_nothing_but_torch(path):
    top_level = {name.split(".")[0] for name in imports(path)}
    assert top_level - sys.stdlib_module_names <= {"torch", "xdlm_hf"}


def test_the_mathematics_loads_without_transformers_and_accelerate():
    script = (
        "import sys; sys.modules['transformers'] = sys.modules['accelerate'] = None; "
        "from xdlm_hf.diffusion import posterior, diffusion_loss, StationaryProcess; from xdlm_hf import kl_divergence"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT)


def test_importing_the_package_imports_no_transformers():
    script = "import sys, xdlm_hf; assert not {'transformers', 'accelerate', 'datasets'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT)


@pytest.mark.parametrize("first", ["import xdlm_hf, transformers", "import transformers, xdlm_hf"])
def test_model_types_are_registered_in_either_order(first):
    script = f"{first}; print(type(transformers.AutoConfig.for_model('llada')).__module__)"
    printed = subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT, capture_output=True, text=True)
    assert printed.stdout.strip() == "xdlm_hf.models.llada.configuration_llada"


def test_public_names_are_all_there():
    assert set(xdlm_hf.__all__) <= set(dir(xdlm_hf))
    for name in xdlm_hf.__all__:
        assert getattr(xdlm_hf, name).__name__ == name


@pytest.mark.parametrize("package", PACKAGES, ids=relative)
def test_a_package_lists_its_modules(package):
    source = (package / "__init__.py").read_text(encoding="utf-8")
    docstring = ast.get_docstring(ast.parse(source), clean=False)
    listed = re.findall(r"^ *(\w+)  +\S", docstring, flags=re.MULTILINE)
    there = {path.stem for path in package.glob("*.py")} | {path.parent.name for path in package.glob("*/__init__.py")}
    assert len(listed) == len(set(listed)) and set(listed) == there - {"__init__", "__main__"}


def test_every_package_is_installed():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    packages = {module_name(path).removesuffix(".__init__") for path in LIBRARY if path.stem == "__init__"}
    assert set(config["options"]["packages"].split()) == packages | {"xdlm_hf.evaluation"}


@pytest.mark.parametrize("path", SHIPPED, ids=relative)
def test_no_remote_code_and_no_pickle(path):
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    # With weights_only=True it builds tensors and plain containers alone; for the conversion of released files.
    calls = [node for node in nodes if isinstance(node, ast.Call) and relative(path) == "xdlm_hf/convert.py"]
    safe = [call.func for call in calls if "weights_only=True" in map(ast.unparse, call.keywords)]
    for node in nodes:
        if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
            assert isinstance(node.value, ast.Constant) and node.value.value is False, f"line {node.lineno}"
        if isinstance(node, ast.Attribute) and node.attr == "load" and isinstance(node.value, ast.Name):
            pickles = node.value.id == "torch" and node not in safe
            assert not pickles, f"line {node.lineno}: torch.load reads pickles; use safetensors"
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


def test_ci_runs_what_the_readme_says():
    assert re.search(r"\bmake test\b", (ROOT / ".ci" / "run").read_text(encoding="utf-8"))
