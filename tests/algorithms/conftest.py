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


@pytest.fixture(scope="session")
def ending(tmp_path_factory):
    """A folder with a policy that ends many of its completions by itself, by one of many EOS tokens."""
    folder = tmp_path_factory.mktemp("ending")
    tokenizer = make_tokenizer()
    model = make_llama(len(tokenizer))
    model.generation_config.eos_token_id = list(range(2, 262, 4))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def seed(monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "7")
    torch.manual_seed(7)
