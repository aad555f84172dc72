import pytest
import torch

from tiny import make_llama, make_tokenizer

SEEDED = ("algorithms", "callbacks", "evaluation", "training")
"""Folders with tests that train: their runs are seeded."""


@pytest.fixture(autouse=True)
def seed(monkeypatch, request):
    """Seed tests that train, and remove the seed that Lightning's `seed_everything` leaves in the environment."""
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    if request.path.parent.name in SEEDED:
        monkeypatch.setenv("PL_GLOBAL_SEED", "7")
        torch.manual_seed(7)


@pytest.fixture
def tokenizer():
    return make_tokenizer()


@pytest.fixture
def llama(tokenizer):
    return make_llama(len(tokenizer))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Return a folder with a tiny policy."""
    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = make_tokenizer()
    make_llama(len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def ending(tmp_path_factory):
    """Return a folder with a policy that has 65 EOS tokens, so that many of its completions are finished."""
    folder = tmp_path_factory.mktemp("ending")
    tokenizer = make_tokenizer()
    model = make_llama(len(tokenizer))
    model.generation_config.eos_token_id = list(range(2, 262, 4))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def wide(tmp_path_factory):
    """Return a folder with a policy whose layers are as wide as a block of 4-bit weights."""
    folder, tokenizer = tmp_path_factory.mktemp("wide"), make_tokenizer()
    make_llama(len(tokenizer), hidden=64).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
