import json
import re

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.loggers.logger import DummyLogger

from fake_algorithm import ByteTokenizer, FakeAlgorithm, FakeOnlineAlgorithm, make_rollout
from lit_rlhf.callbacks import PredictionWriter, SampleLogger
from lit_rlhf.callbacks.samples import COLUMNS, as_text, rollout_samples


class TableLogger(DummyLogger):
    def __init__(self):
        super().__init__()
        self.tables = []

    def log_table(self, key, columns, data):
        self.tables.append((key, columns, data))


def lines(path):
    def refuse(constant):
        raise AssertionError(f"{constant} is not valid JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text(encoding="utf-8").splitlines()]


def test_samples_reach_the_file_the_loggers_and_the_terminal(make_trainer, tmp_path, capsys):
    loggers = [CSVLogger(tmp_path), TensorBoardLogger(tmp_path), table := TableLogger()]
    make_trainer(SampleLogger(every_n_rollouts=3, num_samples=4), logger=loggers).fit(FakeOnlineAlgorithm())
    rows = lines(tmp_path / "lightning_logs" / "version_0" / "samples.jsonl")
    assert all(list(row) == COLUMNS for row in rows)
    train = [row for row in rows if row["split"] == "train"]
    assert [row["step"] for row in train] == [1] * 4 + [7] * 4  # rollouts 0 and 3, of two updates each
    assert train[0]["prompt"] == "say [bold]" and train[0]["completion"] == "ab"
    assert train[1]["prompt"] == [{"role": "user", "content": "hi"}]
    assert train[3]["completion"] == "abc"  # first samples of all prompts, then second samples
    assert train[0]["component_rewards"] == {"style": 1.0, "length": None}
    assert train[3]["kl"] == pytest.approx(2.0) and train[3]["length"] == 4 and train[3]["finished"] is True
    val = [row for row in rows if row["split"] == "val"]
    assert [row["step"] for row in val] == [4] * 5 + [8] * 5 + [12] * 5
    assert val[0]["completion"] == "answer 4" and val[0]["kl"] is None
    assert [key for key, _, _ in table.tables] == [
        "train/samples",
        "val/samples",
        "train/samples",
        *["val/samples"] * 2,
    ]
    assert table.tables[0][1] == COLUMNS and len(table.tables[0][2]) == 4
    events = next((tmp_path / "lightning_logs").rglob("events.out*")).read_bytes()
    assert b"train/samples" in events and b"say [bold]" in events
    shown = re.sub(r"\s", "", capsys.readouterr().out)
    assert "say[bold]" in shown and "samplesafter7updates" in shown


def test_invalid_completions_have_no_reward():
    assert rollout_samples(make_rollout(ByteTokenizer()), ByteTokenizer(), 6)[5]["reward"] is None


def test_reward_includes_token_level_rewards():
    rollout = make_rollout(ByteTokenizer())
    rollout = rollout.replace(token_rewards=rollout.completions.mask.float())
    assert rollout_samples(rollout, ByteTokenizer(), 1)[0]["reward"] == pytest.approx(0.1 + 3)


def test_prompts_without_text_are_decoded():
    rollout = make_rollout(ByteTokenizer())
    rollout = rollout.replace(prompts=rollout.prompts.replace(text=[], tokens=torch.full((3, 2), ord("q"))))
    assert rollout_samples(rollout, ByteTokenizer(), 1)[0]["prompt"] == "qq"


def test_algorithms_without_rollouts_write_nothing(make_trainer, tmp_path):
    make_trainer(SampleLogger()).fit(FakeAlgorithm())
    assert not list(tmp_path.rglob("*.*"))


def test_invalid_arguments_raise():
    with pytest.raises(ValueError, match="every_n_rollouts=0"):
        SampleLogger(every_n_rollouts=0)


def test_message_without_content_shows_its_tool_calls():
    messages = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "tool_calls": [{"name": "add"}]}]
    assert as_text(messages) == 'user: 2 + 2?\nassistant: [{"name": "add"}]'


@pytest.mark.parametrize("text", ["one\u2028two", "one\x85two", "one\ntwo", ""])
def test_predictions_are_one_line_per_completion_for_any_text(text, make_trainer, tmp_path):
    class Predicts(FakeOnlineAlgorithm):
        predict_dataloader = FakeOnlineAlgorithm.val_dataloader

        def predict_step(self, batch, batch_idx):
            return [{"index": batch_idx, "completion": text}]

    make_trainer(PredictionWriter()).predict(Predicts())
    rows = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text(encoding="utf-8").split("\n")[:-1]]
    assert [row["index"] for row in rows] == sorted(row["index"] for row in rows)
    assert rows and all(row["completion"] == text for row in rows)


def test_validation_of_a_checkpoint_logs_its_own_step(make_trainer, tmp_path):
    module = FakeOnlineAlgorithm()
    module.updates_done = 7  # the Trainer counts from 0 there
    make_trainer(SampleLogger()).validate(module, verbose=False)
    assert {row["step"] for row in lines(next(tmp_path.rglob("samples.jsonl")))} == {7}
