"""A tiny model, its tokenizer, a server and a client, for the tests of a file."""

import pytest
from models import model_of

from xdlm_hf.data.tokenizer import train_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["The quick brown fox jumps over the lazy dog. naïve 漢字"] * 4, vocab_size=300)


@pytest.fixture(scope="module")
def model(tokenizer):
    return model_of(tokenizer, max_sequence_length=256)


@pytest.fixture(scope="module")
def server(model, tokenizer):
    from servers import NAME, Server

    from xdlm_hf.serving.app import ServerSettings
    from xdlm_hf.serving.requests import Defaults, Limits

    settings = ServerSettings(NAME, Limits(max_new_tokens=128), Defaults(max_tokens=16, block_length=8))
    running = Server(model, tokenizer, settings)
    yield running
    running.stop()


@pytest.fixture(scope="module")
def client(server):
    return server.client()
