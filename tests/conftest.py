import pytest

from tiny import make_llama, make_tokenizer


@pytest.fixture
def tokenizer():
    return make_tokenizer()


@pytest.fixture
def llama(tokenizer):
    return make_llama(len(tokenizer))
