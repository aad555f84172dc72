"""Questions of reasoning-gym as prompts, and their score as a reward."""

import contextlib

import pytest
from reasoning_gym import create_dataset
from reasoning_gym.factory import DATASETS

from lit_rlhf.data import AsChat, ReasoningGym
from lit_rlhf.data.procedural import RUN_CODE
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
    assert len(few.val) == 200 and 800 < len(few.train) < 3000
    many = {"options": {}, "train_size": 200, "val_size": 50}
    near = [{row["question"] for row in make(**many, seed=seed).val} for seed in (0, 1)]
    assert len(make(**many).train) == 200 and len(near[0] & near[1]) < 3
    assert make(val_size=0).val is None


def test_the_prompt_is_the_question_or_what_a_transform_makes_of_it(tokenizer):
    plain, chat = make(), make(transform=AsChat(instruction="One word."))
    for data in (plain, chat):
        data.tokenizer = tokenizer
        data.setup()
    question = plain.val[0]["question"]
    assert plain.val_set[0].example.prompt == question
    assert chat.val_set[0].example.prompt == [{"role": "user", "content": f"{question}\nOne word."}]
    assert plain.columns("val") == ["question", "answer", "metadata", "options"]


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


def test_answers_are_scored_with_the_options_of_their_task():
    options = {"min_word_length": 3, "max_word_length": 3}
    (row,) = ReasoningGym("word_ladder", options, train_size=1, val_size=0).train
    columns = {name: [row[name]] for name in ("answer", "metadata", "options")}
    assert ReasoningGymScore()([row["answer"]], **columns) == [1.0]


def test_an_answer_at_which_the_check_fails_scores_0():
    metadata = [{"source_dataset": "game_of_life"}]
    assert ReasoningGymScore()(['{"a": 1}'], answer=["[[1]]"], metadata=metadata) == [0.0]


@pytest.mark.parametrize("task", sorted(RUN_CODE))
def test_a_task_that_runs_code_is_refused(task):
    with pytest.raises(ValueError, match="may run its answers or rows as Python code"):
        ReasoningGym(task)
    with pytest.raises(ValueError, match="may run answers or rows as Python code"):
        ReasoningGymScore()(["exit()"], answer=[""], metadata=[{"source_dataset": task}])


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")  # its files
def test_no_other_task_runs_an_answer_or_a_row(tmp_path):
    """Each task checks an answer that is code, and with the right one a row whose strings are."""
    code = f"__import__('os').mkdir({str(tmp_path / 'made')!r})"

    def replaced(value):
        if isinstance(value, str):
            return code
        if isinstance(value, dict):
            return {name: replaced(item) for name, item in value.items()}
        return [replaced(item) for item in value] if isinstance(value, (list, tuple)) else value

    checked = 0
    for task in sorted(DATASETS.keys() - RUN_CODE):
        data = create_dataset(task, size=1, seed=1)
        entry, metadata = data[0], data[0]["metadata"]
        rows = [(code, entry), (f"[{code}]", entry), (entry["answer"], {**entry, "answer": code})]
        rows += [
            (entry["answer"], {**entry, "metadata": {**metadata, name: replaced(metadata[name])}}) for name in metadata
        ]
        for answer, row in rows:
            with contextlib.suppress(Exception):
                data.score_answer(answer, row)
            assert not list(tmp_path.iterdir()), (task, row)
        checked += 1
    assert checked > 90


def test_seed_and_size_are_no_options_of_a_task():
    with pytest.raises(ValueError, match="options has 'seed': give seed, train_size and val_size beside"):
        ReasoningGym("spell_backward", options={"seed": 3})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "spelling"}, r"task='spelling': reasoning-gym has .*spell_backward"),
        ({"options": {"words": 3}}, r"task 'spell_backward' refuses the options \{'words': 3\}: .*words"),
        ({"options": {"min_word_len": 5, "max_word_len": 3}}, "max_word_len must be >= min_word_len"),
        ({"train_size": 0}, "train_size=0 must be at least 1"),
    ],
)
def test_an_unknown_task_or_option_is_one_sentence(options, message):
    with pytest.raises(ValueError, match=message):
        ReasoningGym(**{"task": "spell_backward", **options})


def test_too_few_different_questions_are_one_sentence():
    one_digit = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
    with pytest.raises(ValueError, match=r"'chain_sum' has \d+ different questions .* val_size=500 leaves none"):
        ReasoningGym("chain_sum", one_digit, train_size=100, val_size=500)
