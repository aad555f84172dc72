"""Data modules with a Trainer, from the command line, and on their own."""

import json
import logging
import pickle

import datasets
import lightning
import pytest
import torch
from jsonargparse import ArgumentParser

from lit_rlhf.data import DemonstrationData, PreferenceData, PromptData
from lit_rlhf.types import Demonstrations, Preferences, Prompts
from tiny import make_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # from Lightning with a newer torch

ROWS = [{"prompt": f"Prompt {i:02}", "answer": i} for i in range(20)]
PAIRS = [{"prompt": f"{i}", "chosen": "good", "rejected": "bad"} for i in range(20)]
DEMONSTRATIONS = [{"prompt": f"{i}", "completion": "good"} for i in range(20)]


class Reader(lightning.LightningModule):
    """Trains a dummy weight and records the batches of every stage."""

    steps_per_rollout, seed = 2, 3

    def __init__(self):
        super().__init__()
        self.tokenizer = make_tokenizer()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.batches = {"train": [], "val": [], "test": [], "predict": []}
        self.configured = False

    def configure_model(self):
        self.configured = True

    def training_step(self, batch, batch_idx):
        self.batches["train"].append(batch)
        return self.weight * 1.0

    def validation_step(self, batch, batch_idx):
        self.batches["val"].append(batch)

    def test_step(self, batch, batch_idx):
        self.batches["test"].append(batch)

    def predict_step(self, batch, batch_idx):
        self.batches["predict"].append(batch)
        return len(batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def texts(self, stage):
        return [text for batch in self.batches[stage] for text in batch.text]


def make_trainer(**flags):
    quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    return lightning.Trainer(accelerator="cpu", **{"max_epochs": 1, **quiet, **flags})


def fit(data, **flags):
    module, trainer = Reader(), make_trainer(**flags)
    trainer.fit(module, data)
    return module


def test_each_prompt_is_in_one_block_per_epoch_and_each_block_is_repeated():
    module = fit(PromptData(ROWS, batch_size=4), max_epochs=2)
    batches = module.batches["train"]
    assert len(batches) == 20 and all(isinstance(batch, Prompts) for batch in batches)
    assert all(first.text == second.text for first, second in zip(batches[::2], batches[1::2], strict=True))
    for epoch in (batches[:10:2], batches[10::2]):
        assert sorted(text for batch in epoch for text in batch.text) == [row["prompt"] for row in ROWS]
        for batch in epoch:
            assert batch.columns["answer"] == batch.index.tolist() == [int(text[-2:]) for text in batch.text]


def test_no_validation_without_val():
    assert fit(PromptData(ROWS, batch_size=4)).batches["val"] == []


def test_val_as_a_number_or_share_holds_out_rows():
    for val in (6, 0.3):
        data = PromptData(ROWS, val=val, batch_size=2, eval_batch_size=4)
        module = fit(data, num_sanity_val_steps=0)
        train, held_out = set(module.texts("train")), module.texts("val")
        assert len(held_out) == 6 == len(set(held_out)) and held_out == sorted(held_out)
        assert len(train) == 14 and not train & set(held_out)
        assert [len(batch) for batch in module.batches["val"]] == [3, 3]


def test_the_random_split_ignores_the_seed_and_the_last_split_takes_the_end():
    def held_out(**arguments):
        data = PromptData(ROWS, val=5, batch_size=4, **arguments)
        data.tokenizer = make_tokenizer()
        data.setup()
        return [row.index for row in data.val_set]

    lightning.seed_everything(1, verbose=False)
    first = held_out()
    lightning.seed_everything(2, verbose=False)
    assert held_out() == first != [15, 16, 17, 18, 19] == held_out(split="last")


def test_validate_test_and_predict_load_only_val(tmp_path):
    path = tmp_path / "val.jsonl"
    path.write_text("\n".join(map(json.dumps, ROWS[:5])))
    data = PromptData(train="there-is-none.jsonl", val=str(path), batch_size=2)
    module, trainer = Reader(), make_trainer()
    trainer.validate(module, data, verbose=False)
    trainer.test(module, data, verbose=False)
    trainer.predict(module, data)
    for stage in ("val", "test", "predict"):
        assert module.texts(stage) == [row["prompt"] for row in ROWS[:5]]


def test_demonstrations_and_preferences_reach_training():
    demonstrations = fit(DemonstrationData(DEMONSTRATIONS, val=4, batch_size=4)).batches
    assert all(isinstance(batch, Demonstrations) and batch.tokens.shape[1] == 1 for batch in demonstrations["train"])
    preferences = fit(PreferenceData(datasets.Dataset.from_list(PAIRS), val=4, batch_size=4)).batches
    assert all(isinstance(batch, Preferences) and batch.tokens.shape[1] == 2 for batch in preferences["train"])
    assert demonstrations["val"] and preferences["val"]


def test_transform_length_limit_and_drop_duplicates_combine(caplog):
    caplog.set_level(logging.INFO)
    rows = [{"q": "ab"}, {"q": "ab"}, {"q": "abcdefgh"}, {"q": "abc"}, {"q": ""}]
    data = PromptData(
        rows,
        prompt_column="question",
        transform=lambda row: {"question": row["q"]} if row["q"] else None,
        max_prompt_tokens=4,
        drop_duplicates=True,
        batch_size=2,
    )
    data.tokenizer = make_tokenizer()
    data.setup()
    assert [row.example.prompt for row in data.train_set] == ["ab", "abc"]
    assert [record.getMessage() for record in caplog.records] == [
        "1 of 5 rows were dropped by the transform",
        "1 of 4 prompts are duplicates: dropped",
        "1 of 3 prompts are longer than 4 tokens: dropped",
    ]


def test_without_a_trainer():
    data = PromptData(ROWS, val=4, batch_size=4)
    with pytest.raises(ValueError, match=r"set data\.tokenizer before data.setup"):
        data.setup()
    data.tokenizer = make_tokenizer()
    data.setup()
    assert len(next(iter(data.train_dataloader()))) == 4
    assert len(next(iter(data.val_dataloader()))) == 4


def test_dataset_and_collate_function_are_pickled_without_the_trainer():
    data = PromptData(ROWS, batch_size=4, num_workers=1)
    make_trainer().fit(Reader(), data)
    loader = data.train_dataloader()
    dataset, collate = pickle.loads(pickle.dumps((loader.dataset, loader.collate_fn)))
    assert collate(dataset[[1, 2]]).text == ["Prompt 01", "Prompt 02"]


def test_rows_are_encoded_once_per_tokenizer():
    data, module = PromptData(ROWS, val=4, batch_size=4), Reader()
    make_trainer().fit(module, data)
    first = data.val_set
    make_trainer().validate(module, data, verbose=False)
    assert data.val_set is first
    make_trainer().fit(Reader(), data)
    assert data.val_set is not first


def test_demonstrations_may_have_empty_prompts():
    module = fit(DemonstrationData([{"text": "A whole text."}] * 4, batch_size=2))
    assert [batch.mask.sum(-1).unique().item() > 1 for batch in module.batches["train"]] == [True] * 4


@pytest.mark.parametrize(
    ("make", "flags", "message"),
    [
        (lambda: PromptData(), {}, "no training data: set data.train"),
        (lambda: PromptData([]), {}, "is empty"),
        (lambda: PromptData(datasets.Dataset.from_list(ROWS).to_iterable_dataset()), {}, "is a stream"),
        (lambda: PromptData([*ROWS, {"prompt": " "}]), {}, "the prompt of row 20 is empty"),
        (lambda: PromptData(ROWS, prompt_column="q"), {}, "no column 'q' in the data, which have 'prompt', 'answer'"),
        (lambda: PromptData(ROWS, max_prompt_tokens=2), {}, "all 20 prompts are longer than 2 tokens"),
        (
            lambda: PromptData(ROWS, batch_size=21),
            {},
            "20 rows .* fewer than the 21 .*batch_size 21 x devices 1 x blocks 1",
        ),
        (lambda: PromptData(ROWS, batch_size=8), {"accumulate_grad_batches": 6}, "20 rows .* fewer than the 24 "),
        (lambda: PromptData(ROWS), {"overfit_batches": 1}, "overfit_batches=1 would replace the sampler"),
        (lambda: PromptData(ROWS, val=20), {}, "val=20 holds out 20 of 20 rows"),
        (lambda: PromptData(ROWS, val="no.csv"), {}, "'no.csv' does not exist"),
        (lambda: PreferenceData(ROWS), {}, "row 0: no column 'chosen' in the data, .* chosen_column"),
        (lambda: DemonstrationData(ROWS), {}, "row 0: no demonstrations"),
    ],
)
def test_unusable_data_raise_before_the_model_is_configured(make, flags, message):
    module = Reader()
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        make_trainer(**flags).fit(module, make())
    assert not module.configured


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_evaluation_without_val_raises(stage):
    with pytest.raises(ValueError, match=f"no data to {stage}: set data.val"):
        getattr(make_trainer(), stage)(Reader(), PromptData(ROWS))
    with pytest.raises(ValueError, match=r"val=4 is a part of data.train, which is not set"):
        getattr(make_trainer(), stage)(Reader(), PromptData(val=4))


@pytest.mark.parametrize(
    "arguments",
    [{"batch_size": 0}, {"max_prompt_tokens": 0}, {"val": 0}, {"val": 1.5}, {"val": -1}, {"num_workers": -1}],
)
def test_numbers_out_of_range_raise_at_construction(arguments):
    with pytest.raises(ValueError, match="{}={}".format(*next(iter(arguments.items())))):
        PromptData(ROWS, **arguments)


@pytest.mark.parametrize("kind", [PromptData, DemonstrationData, PreferenceData])
def test_arguments_on_the_command_line(kind):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind, "data")
    line = (
        "--data.train a.jsonl --data.val 0.25 --data.batch_size 4 --data.truncation truncate --data.max_prompt_tokens 9"
    )
    line += (
        " --data.transform lit_rlhf.data.FirstWords --data.transform.words 7 --data.chat_template_kwargs.think false"
    )
    data = parser.instantiate(parser.parse_args(line.split())).data
    assert (data.train, data.val, data.batch_size, data.truncation) == ("a.jsonl", 0.25, 4, "truncate")
    assert data.transform.words == 7 and data.chat_template_kwargs == {"think": False}
    assert parser.instantiate(parser.parse_args(["--data.val", "20"])).data.val == 20
    assert parser.instantiate(parser.parse_args(['--data.train=[{"prompt": "a"}]'])).data.train == [{"prompt": "a"}]
