"""The filter of system calls: every number tried, and read from the filter itself."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import system_calls
from sandboxes import (
    attack,
    needs_filter,
    needs_namespaces,
    needs_root,
)

from xdlm_hf.evaluation import sandbox

pytestmark = pytest.mark.usefixtures("consent")


ORDINARY_USER = 64_000


def as_ordinary_user(script):
    """What a script of this folder prints as JSON, run by a user who has no rights and an account nowhere.

    In a mount namespace, where Python, which may be under /root, lies where that user can read it; with a package that
    holds the evaluation alone.
    """
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        package = folder / "xdlm_hf" / "evaluation"
        shutil.copytree(Path(sandbox.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
        (package.parent / "__init__.py").touch()
        shutil.copy(importlib.util.find_spec("pyseccomp").origin, folder)
        shutil.copy(Path(__file__).with_name(script), folder)
        (folder / "python").mkdir()
        subprocess.run(["chmod", "-R", "a+rX", folder], check=True)
        python = f"{folder}/python/bin/python{sys.version_info.major}.{sys.version_info.minor}"
        user = f"setpriv --reuid {ORDINARY_USER} --regid {ORDINARY_USER} --clear-groups"
        command = f"mount --bind {sys.base_prefix} {folder}/python && exec {user} {python} -B {folder}/{script}"
        environment = {"PYTHONPATH": str(folder), "PATH": os.environ["PATH"]}
        done = subprocess.run(
            ["unshare", "--mount", "sh", "-c", command], env=environment, cwd="/", capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)


@needs_filter
class TestSystemCalls:
    """Each number tried: from within, where the filter answers with an error number that no kernel knows."""

    def check(self, result):
        assert "system calls" in result["layers"]
        assert result["verdict"][0] == "wrong" and result["unchanged"]
        let_through, worked = json.loads(result["verdict"][1])
        assert not let_through
        assert set(worked) <= set(result["allowed"]) and worked  # the calls were made
        assert result["tried"] == result["refused"] + len(result["allowed"]) and result["refused"] > 1900
        # The 32-bit entry, where the kernel has it: not a process id.
        assert result["32-bit entry"] in (
            ["wrong", str(-system_calls.REFUSAL)],
            ["failed", "the answer's process broke off"],
        )

    def test_every_number(self, prefix, monkeypatch):
        monkeypatch.setattr(sandbox, "_REFUSAL", sandbox._REFUSAL)  # which the sweep changes
        try:
            self.check(system_calls.sweep(prefix))
        finally:
            sandbox.system_call_filter.cache_clear()

    @needs_root
    @needs_namespaces
    def test_every_number_as_an_ordinary_user(self):
        result = as_ordinary_user("system_calls.py")
        assert result["user"] == ORDINARY_USER
        self.check(result)

    def test_the_filter_by_number(self):
        program = bytes.fromhex(sandbox.system_call_filter())
        refused = 0x50000 | sandbox._REFUSAL
        here = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}[os.uname().machine]
        plain = system_calls.numbers(sandbox._ALLOWED)
        for number in (*range(4096), *range(system_calls.X32, system_calls.X32 + 4096), 2**31 - 1, -1):
            wanted = 0x7FFF0000 if number in plain else refused
            if number not in system_calls.allowed():
                assert system_calls.decide(program, here, number) == refused
            elif number in plain:
                assert system_calls.decide(program, here, number) == wanted
            for other in (0x40000003, 0xC000003E ^ 0x80000000, 0x40000028, 0xC00000F3):  # i386, x32, arm, riscv64
                assert system_calls.decide(program, other, number) == refused
        for (name, position), values in sandbox._ALLOWED_VALUES.items():
            for value in (*range(2048), *values, 0x8901, 0x8902, 0x5452, 0x40086602, 2**32 - 1):
                for high in (0, 2**32):  # the kernel reads the low half
                    arguments = [0] * 6
                    arguments[position] = value | high
                    decision = system_calls.decide(program, here, sandbox._number(name), arguments)
                    assert (decision == 0x7FFF0000) == (value in values), (name, value)

    def test_an_incomplete_filter_is_not_announced(self, monkeypatch, caplog):
        sandbox.system_call_filter.cache_clear()
        monkeypatch.setattr(sandbox, "_ALLOWED", [*sandbox._ALLOWED, "no_such_call"])
        assert sandbox.system_call_filter() == ""
        assert "libseccomp does not know the system call 'no_such_call'" in caplog.text
        monkeypatch.setitem(sys.modules, "pyseccomp", None)
        sandbox.system_call_filter.cache_clear()
        try:
            assert (
                sandbox.system_call_filter() == "" and "no filter of system calls: import of pyseccomp" in caplog.text
            )
            for prefix in (None, ()):
                verdict = attack("def one(): return SECRET", prefix, known=True)
                assert verdict.result == "pass" and "system calls" not in verdict.layers
        finally:
            sandbox.system_call_filter.cache_clear()
