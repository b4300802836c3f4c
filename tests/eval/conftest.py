"""Consent to run code, and the two ways to run it: with namespaces and without."""

import pytest
from sandboxes import needs_namespaces


@pytest.fixture
def consent(monkeypatch):
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "1")


@pytest.fixture(params=[pytest.param(None, id="namespaces", marks=needs_namespaces), pytest.param((), id="none")])
def prefix(request):
    return request.param
