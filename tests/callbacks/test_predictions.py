"""What `predict` writes survives a full disk and another run in the same folder."""

import json
import os

import pytest

from fake_algorithm import FakeOnlineAlgorithm
from full_disk import largest_file
from lit_rlhf.callbacks import PredictionWriter


class Predicts(FakeOnlineAlgorithm):
    """Predicts twelve batches of one row."""

    def __init__(self, text):
        super().__init__()
        self.text = text

    predict_dataloader = FakeOnlineAlgorithm.train_dataloader

    def predict_step(self, batch, batch_idx):
        return [{"index": batch_idx, "completion": self.text}]


def read(folder):
    return [json.loads(line)["completion"] for line in (folder / "predictions.jsonl").read_text().splitlines()]


def test_a_full_disk_gets_a_sentence_and_keeps_what_was_there(make_trainer, tmp_path):
    make_trainer(PredictionWriter()).predict(Predicts("before"))
    with pytest.raises(ValueError, match=r"predictions.jsonl' can't be written \(File too large\): make room, or give"):
        with largest_file(500):
            make_trainer(PredictionWriter()).predict(Predicts("x" * 50))
    assert read(tmp_path) == ["before"] * 12
    (part,) = tmp_path.glob(".predictions.jsonl.*")
    assert json.loads(part.read_text().splitlines()[0])["completion"] == "x" * 50
    os.utime(part, (0, 0))
    make_trainer(PredictionWriter()).predict(Predicts("after"))
    assert read(tmp_path) == ["after"] * 12
    assert [path.name for path in tmp_path.iterdir()] == ["predictions.jsonl"]


def test_runs_into_one_folder_at_the_same_time_do_not_mix(make_trainer, tmp_path):
    class Nested(Predicts):
        def predict_step(self, batch, batch_idx):
            if batch_idx == 4:
                make_trainer(PredictionWriter()).predict(Predicts("second"))
                assert read(tmp_path) == ["second"] * 12
            return super().predict_step(batch, batch_idx)

    make_trainer(PredictionWriter()).predict(Nested("first"))
    assert read(tmp_path) == ["first"] * 12
    assert [path.name for path in tmp_path.iterdir()] == ["predictions.jsonl"]
