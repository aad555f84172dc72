"""Rewards for strings that are given conversations."""

import pytest

import lit_rlhf
from lit_rlhf.rewards import Guarded, Scorer, to_text
from runs import make_module, make_trainer

PROMPT = [{"role": "user", "content": "Say hello."}]
CHAT = dict(
    prompts=[PROMPT],
    completions=[[[{"role": "assistant", "content": "Hello."}]]],
    completion_ids=[[[1]]],
    finished=[[True]],
)


def polite(completions, **kwargs):
    return [float("hello" in text.lower()) for text in completions]


def reads(completions, **kwargs):
    return [float("hello" in to_text(text).lower()) for text in completions]


async def polite_later(completions, **kwargs):
    return polite(completions)


@pytest.mark.parametrize("reward", [polite, polite_later, Guarded(polite, retries=0)])
def test_an_error_with_messages_names_the_helper(reward):
    message = r"'list' object has no attribute 'lower' \(the data are conversations.*lit_rlhf\.rewards\.to_text"
    with pytest.raises(RuntimeError, match=message) as failure:
        Scorer([reward])(**CHAT)
    assert isinstance(failure.value.__cause__, AttributeError)


def test_an_error_of_the_network_or_with_strings_does_not():
    def offline(completions):
        raise ConnectionError("offline")

    with pytest.raises(RuntimeError, match=r"offline$"):
        Scorer([offline])(**CHAT)

    def wrong(completions):
        return completions.x

    with pytest.raises(RuntimeError, match=r"no attribute 'x'$"):
        Scorer([wrong])(["a"], [["b"]], [[[1]]], [[True]])


def test_a_reward_for_strings_fails_on_chat_data_before_a_model_is_loaded(tiny, tmp_path, monkeypatch):
    def load(*args, **kwargs):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(lit_rlhf.Policy, "from_pretrained", load)
    data = lit_rlhf.PromptData(train=[{"prompt": PROMPT}] * 4, batch_size=2)
    message = r"'polite' can't read conversations \(AttributeError: .*test_messages.py:\d+\): .*to_text"
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, max_steps=1).fit(make_module("RLOO", tiny, rewards=[reads, polite]), data)


def shorter(completions, opponents):
    return [float(len(a.strip()) < len(b.strip())) for a, b in zip(completions, opponents, strict=True)]


def longer(completions, opponents):
    return [float(len(to_text(a)) > len(to_text(b))) for a, b in zip(completions, opponents, strict=True)]


shorter.pairwise = longer.pairwise = True


@pytest.mark.parametrize("judge", [polite, shorter, reads, longer])
def test_a_judge_is_tried_too(judge, tiny, tmp_path, monkeypatch):
    def load(*args, **kwargs):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(lit_rlhf.Policy, "from_pretrained", load)
    sentence = f"{judge.__name__}' can't read conversations" if judge in (polite, shorter) else "a model was loaded"
    data = lit_rlhf.PromptData(train=[{"prompt": PROMPT}] * 4, batch_size=2)
    with pytest.raises((ValueError, AssertionError), match=sentence):
        make_trainer(tmp_path, max_steps=1).fit(make_module("RLOO", tiny, rewards=[reads], judge=judge), data)
