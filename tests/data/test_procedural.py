"""Questions of reasoning-gym as prompts, and their score as a reward."""

import pytest

from lit_rlhf.data import AsChat, ReasoningGym
from lit_rlhf.rewards import ReasoningGymScore

WORDS = {"max_word_len": 4}


def make(**options):
    return ReasoningGym("spell_backward", **{"options": WORDS, "train_size": 40, "val_size": 8, **options})


def test_questions_depend_on_the_seed_alone_and_none_of_the_validation_is_trained_on():
    data, again, other = make(), make(), make(seed=5)
    assert (data.train, data.val) == (again.train, again.val)
    assert other.val != data.val
    questions = [row["question"] for row in data.train + data.val]
    assert len(set(questions)) == len(questions)
    few = make(options={"min_word_len": 3, "max_word_len": 3}, train_size=3000, val_size=200)
    assert not {row["question"] for row in few.val} & {row["question"] for row in few.train}
    assert len(few.train) < 3000


def test_the_prompt_is_the_question_or_what_a_transform_makes_of_it(tokenizer):
    plain, chat = make(), make(transform=AsChat(instruction="One word."))
    for data in (plain, chat):
        data.tokenizer = tokenizer
        data.setup()
    question = plain.val[0]["question"]
    assert plain.val_set[0].example.prompt == question
    assert chat.val_set[0].example.prompt == [{"role": "user", "content": f"{question}\nOne word."}]
    assert plain.columns("val") == ["question", "answer", "metadata"]


def test_answers_are_scored_by_their_task():
    rows = make().val
    answers = [row["answer"] for row in rows]
    columns = {"answer": answers, "metadata": [row["metadata"] for row in rows]}
    assert ReasoningGymScore()([f" {answer}\n" for answer in answers], **columns) == [1.0] * len(rows)
    assert ReasoningGymScore("<a>(.*?)</a>")([f"so <a>{answer}</a>" for answer in answers], **columns) == [1.0] * 8
    assert ReasoningGymScore("<a>(.*?)</a>")(answers, **columns) == [0.0] * len(rows)
    word = [{"source_dataset": "spell_backward"}]
    assert ReasoningGymScore()(["nxs"], answer=["nus"], metadata=word) == [pytest.approx(2 / 3)]  # letters in place
    assert ReasoningGymScore()(["nus"], answer=["nus"], metadata=[None]) == [None]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "spelling"}, r"task='spelling': reasoning-gym has .*spell_backward"),
        ({"options": {"words": 3}}, r"task 'spell_backward' refuses the options \{'words': 3\}: .*words"),
        ({"options": {"min_word_len": 5, "max_word_len": 3}}, "max_word_len must be >= min_word_len"),
    ],
)
def test_an_unknown_task_or_option_is_one_sentence(options, message):
    with pytest.raises(ValueError, match=message):
        ReasoningGym(**{"task": "spell_backward", **options})
