"""Rules of the house that a reader would otherwise have to check by hand (CONTRIBUTING.md states them)."""

import ast
import configparser
import functools
import re
import string
import subprocess
import sys
from graphlib import TopologicalSorter
from importlib.util import resolve_name
from pathlib import Path

import pytest
from models import model_of, save_checkpoint

import xdlm_hf
from xdlm_hf.data.tokenizer import symbol_tokenizer, train_tokenizer

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")

# What a package, or a module beside the packages, may import from besides itself.
MAY_IMPORT = {
    "diffusion": set(),
    "generation": {"diffusion"},
    "models": {"diffusion", "generation"},
    "data": set(),
    "training": {"diffusion", "generation", "models", "data"},
    "atomic": set(),
    "watch": {"atomic"},
    "loading": {"data", "models"},
    "serving": {"generation", "data", "watch", "loading"},
    "hub": {"atomic", "diffusion", "generation", "models"},
    "convert": {"atomic", "models", "data", "loading"},
    "image_pipeline": {"data", "generation"},
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


@functools.cache
def nodes(path: Path) -> list[ast.AST]:
    return list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))


@functools.cache
def imports(path: Path) -> list[str]:
    """Every module a file imports, at any depth, by its whole name."""
    found = []
    for node in nodes(path):
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


def test_imports_point_one_way():
    wrong = []
    for path in MODULES:
        place = path.relative_to(ROOT / "xdlm_hf").parts[0].removesuffix(".py")
        # The package's own root and the evaluation count as lying below everything.
        others = {(name.split(".") + ["xdlm_hf"])[1] for name in siblings(path)} - {place}
        wrong += [f"{relative(path)} imports from {other}" for other in sorted(others - MAY_IMPORT[place])]
    assert not wrong


def test_imports_make_no_cycle():
    TopologicalSorter({module_name(path): siblings(path) for path in MODULES}).prepare()


def test_the_mathematics_needs_nothing_but_torch():
    files = [path for path in LIBRARY if path.is_relative_to(ROOT / "xdlm_hf" / "diffusion")]
    known = sys.stdlib_module_names | {"torch", "xdlm_hf"}
    files.remove(
        ROOT / "xdlm_hf" / "diffusion" / "ops" / "triton_rows.py"
    )  # imported on a GPU alone, if Triton is there
    assert files and not [(relative(path), n) for path in files for n in imports(path) if n.split(".")[0] not in known]


def test_neither_the_package_nor_the_mathematics_loads_transformers_and_accelerate():
    script = (
        "import sys, xdlm_hf; assert not {'torch', 'transformers', 'accelerate', 'diffusers'} & set(sys.modules); "
        "sys.modules['transformers'] = sys.modules['accelerate'] = None; "
        "from xdlm_hf.diffusion import posterior, diffusion_loss, StationaryProcess; from xdlm_hf import kl_divergence"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT)


@pytest.mark.parametrize("first", ["import transformers, xdlm_hf", "import xdlm_hf, transformers.modeling_layers"])
def test_model_types_are_registered_in_any_order(first):
    """Some modules of Transformers, modeling_layers among them, import the Auto classes halfway."""
    script = (
        f"{first}; from transformers import AutoConfig, AutoModel; "
        "config = AutoConfig.for_model('llada', d_model=8, n_heads=2, n_layers=1, mlp_hidden_size=8, vocab_size=9, "
        "embedding_size=9, mask_token_id=8, eos_token_id=0, pad_token_id=0); "
        "print(type(config).__module__, type(AutoModel.from_config(config)).__module__)"
    )
    printed = subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT, capture_output=True, text=True)
    modules = [f"xdlm_hf.models.llada.{part}_llada" for part in ("configuration", "modeling")]
    assert printed.stdout.split() == modules


@pytest.mark.parametrize(
    ("more", "absent"),
    [
        ("import transformers", "{'torch', 'transformers.modeling_utils', 'xdlm_hf.models'}"),
        ("from transformers import AutoConfig", "{'transformers.modeling_utils', 'xdlm_hf.models.registry'}"),
    ],
)
def test_transformers_stays_lazy(more, absent):
    script = f"import sys, xdlm_hf; {more}; print({absent} & set(sys.modules))"
    printed = subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT, capture_output=True, text=True)
    assert printed.stdout.strip() == "set()"


def test_evaluation_and_serving_load_neither_the_trainer_nor_bitsandbytes():
    # Transformers' Trainer imports peft, and that bitsandbytes, which takes seconds and logs a warning on a CPU.
    modules = "serving.chat, serving.server, evaluation.cli, evaluation.perplexity, evaluation.generative_perplexity"
    script = (
        f"import sys; from importlib import import_module; "
        f"[import_module('xdlm_hf.' + name) for name in '{modules}'.split(', ')]; "
        "assert not {'transformers.trainer', 'transformers.trainer_utils', 'bitsandbytes'} & set(sys.modules)"
    )
    # -P: the installed package, because xdlm_hf.evaluation is not a folder of the source tree.
    subprocess.run([sys.executable, "-P", "-c", script], check=True)


def test_type_checkers_see_the_public_names_and_their_modules():
    init = ast.parse((ROOT / "xdlm_hf" / "__init__.py").read_text(encoding="utf-8"))
    block = next(node for node in init.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    seen = {alias.asname: node.module for node in block.body for alias in node.names}
    assert seen == xdlm_hf._IMPORTED_ON_DEMAND
    assert (ROOT / "xdlm_hf" / "py.typed").is_file()


def test_public_names_are_all_there():
    assert set(xdlm_hf.__all__) <= set(dir(xdlm_hf))
    for name in xdlm_hf.__all__:
        assert getattr(xdlm_hf, name).__name__ == name


@pytest.mark.parametrize("package", [*PACKAGES, ROOT / "eval"], ids=relative)
def test_a_package_lists_its_modules(package):
    source = (package / "__init__.py").read_text(encoding="utf-8")
    docstring = ast.get_docstring(ast.parse(source), clean=False)
    listed = re.findall(r"^ *(\w+)  +\S", docstring, flags=re.MULTILINE)
    there = {path.stem for path in package.glob("*.py")} | {path.parent.name for path in package.glob("*/*.py")}
    assert len(listed) == len(set(listed)) and set(listed) == there - {"__init__", "__main__"}


def test_the_layout_names_every_folder():
    layout = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").partition("## Layout")[2].partition("\n## ")[0]
    packages = {f"{relative(path)}/" for path in PACKAGES if path.parent == ROOT / "xdlm_hf"}
    assert set(re.findall(r"^    (\S+/)  ", layout, flags=re.MULTILINE)) == packages | {
        "eval/",
        "recipes/",
        "benchmarks/",
        "examples/",
    }


def test_a_folder_of_tests_has_the_name_of_what_it_tests():
    tests = ROOT / "tests"
    folders = {path.parent.relative_to(tests).as_posix() for path in tests.rglob("test_*.py")} - {"."}
    named = {path.relative_to(ROOT / "xdlm_hf").as_posix() for path in PACKAGES} | {"eval", "recipes", "benchmarks"}
    assert {"diffusion", "eval"} <= folders and not folders - named
    # Test files are modules of one namespace, and a folder that were a package would hide the helper of its name.
    names = [path.name for path in tests.rglob("test_*.py")]
    assert len(names) == len(set(names)) and not list(tests.rglob("__init__.py"))


def test_tiny_models_are_built_in_one_place():
    tests = ROOT / "tests"
    builders = {
        path.relative_to(tests).as_posix()
        for path in tests.rglob("*.py")
        for node in nodes(path)
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("LLaDAForDiffusionLM")
    }
    assert builders <= {"models.py", "models/test_modeling_llada.py"}  # the latter tests the class itself
    assert "models.py" in builders


def test_every_package_is_installed():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    packages = {module_name(path).removesuffix(".__init__") for path in LIBRARY if path.stem == "__init__"}
    assert set(config["options"]["packages"].split()) == packages | {"xdlm_hf.evaluation"}


def test_no_remote_code_and_no_pickle():
    wrong = []
    for path in SHIPPED:
        # With weights_only=True, torch.load builds only tensors and plain containers; used for released files.
        calls = [node for node in nodes(path) if isinstance(node, ast.Call) and relative(path) == "xdlm_hf/convert.py"]
        safe = [call.func for call in calls if "weights_only=True" in map(ast.unparse, call.keywords)]
        for node in nodes(path):
            if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
                if not (isinstance(node.value, ast.Constant) and node.value.value is False):
                    wrong.append(f"{relative(path)}, line {node.lineno}: trust_remote_code must be False")
            if isinstance(node, ast.Attribute) and node.attr == "load" and isinstance(node.value, ast.Name):
                if node.value.id == "torch" and node not in safe:
                    wrong.append(f"{relative(path)}, line {node.lineno}: torch.load reads pickles; use safetensors")
        pickles = {"pickle", "dill", "cloudpickle"} & {name.split(".")[0] for name in imports(path)}
        wrong += [f"{relative(path)} imports {name}" for name in pickles]
    assert not wrong


def test_functions_fit_on_a_screen():
    long = []
    for path in SHIPPED:
        for node in nodes(path):
            if isinstance(node, ast.FunctionDef):
                docstring = len((ast.get_docstring(node, clean=False) or "").splitlines())
                length = node.end_lineno - node.lineno + 1 - docstring
                if length > 60:
                    long.append(f"{relative(path)}: {node.name} has {length} lines without its docstring")
    assert not long


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


def test_readme_is_short_and_its_pictures_small():
    assert len(README.splitlines()) < 120
    pictures = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", README)
    assert len(pictures) == 2 and all((ROOT / picture).stat().st_size < 2**20 for picture in pictures)


def test_readme_examples_run_as_they_stand(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    letters = symbol_tokenizer(
        [*string.ascii_lowercase, "<", ">", ":", "[MASK]", "[EOS]"], "[EOS]", mask_token="[MASK]"
    )
    letters.eos_token = letters.pad_token = "[EOS]"
    words = train_tokenizer(["The capital of France is Paris."], vocab_size=270)
    demo, llada = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    for example, name, tokenizer in ((demo, "outputs/demo/k0.1", letters), (llada, "GSAI-ML/LLaDA-8B-Base", words)):
        assert example.count(f'"{name}"') == 2
        save_checkpoint(Path(name), model_of(tokenizer), tokenizer)
        exec(example, {})
    lines = capsys.readouterr().out.splitlines()  # DeepSpeed may log to stdout before
    assert [line.split()[0] for line in lines[-4:-1]] == ["32", "8", "4"]
    assert all("a>q>z>c>k>m>:" in line for line in lines[-4:-1])
    assert ast.literal_eval(lines[-1])[0].startswith("The capital of France is")


def test_ci_runs_what_the_readme_says():
    assert re.search(r"\bmake test\b", (ROOT / ".ci" / "run").read_text(encoding="utf-8"))
