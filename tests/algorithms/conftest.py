import pytest
import torch

from tiny import make_llama, make_tokenizer


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A folder with a tiny policy."""
    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = make_tokenizer()
    make_llama(len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def seed(monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "7")
    torch.manual_seed(7)
