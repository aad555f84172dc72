import pytest

from tiny import make_llama, make_tokenizer


@pytest.fixture(autouse=True)
def unseeded(monkeypatch):
    """Lightning's `seed_everything` leaves its seed in the environment, where the next test's methods would find it."""
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)


@pytest.fixture
def tokenizer():
    return make_tokenizer()


@pytest.fixture
def llama(tokenizer):
    return make_llama(len(tokenizer))
