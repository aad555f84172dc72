"""KTO: its loss by hand, the labels it reads, and the KL over a batch."""

import math

import pytest
import torch

import lit_rlhf
from lit_rlhf import functional as F
from lit_rlhf.errors import InputError
from runs import make_data, make_module, make_trainer
from tensors import double


def test_loss_by_hand():
    def sigmoid(x):
        return 1 / (1 + math.exp(-x))

    actual = F.kto_loss(double([3.0, -1.0]).squeeze(), double(0.5).squeeze(), torch.tensor([True, False]), 0.2)
    assert actual.tolist() == pytest.approx([1 - sigmoid(0.2 * 2.5), 1 - sigmoid(0.2 * 1.5)])


def test_a_step_is_the_published_loss_of_its_batch(tiny, tmp_path):
    seen = []

    class Watched(lit_rlhf.KTO):
        def training_step(self, batch, batch_idx):
            with torch.no_grad():
                own, reference = (
                    [model.logprobs(batch.prompts, rows).sum((1, 2)) for rows in (batch, mixed(batch))]
                    for model in (self.policy, self.reference)
                )
            matched, others = (a - b for a, b in zip(own, reference, strict=True))
            z = max(0.0, float(others.mean()))
            labels = batch.prompts.columns["label"]
            weights = [2.0 if label else 0.5 for label in labels]
            signs = [1 if label else -1 for label in labels]
            terms = [
                w * (1 - torch.sigmoid(s * self.beta * (x - z)))
                for w, s, x in zip(weights, signs, matched, strict=True)
            ]
            loss = super().training_step(batch, batch_idx)
            seen.append((float(loss.detach()), float(sum(terms) / len(terms)), z))
            return loss

    module = Watched(str(tiny), desirable_weight=2.0, undesirable_weight=0.5, optimizer=adam)
    make_trainer(tmp_path, max_steps=4, limit_val_batches=0).fit(module, make_data("KTO"))
    assert seen[0][2] == 0.0 and any(z > 0 for _, _, z in seen)
    for actual, expected, _ in seen:
        assert actual == pytest.approx(expected, abs=1e-5)


def adam(params):
    return torch.optim.AdamW(params, lr=1e-2)


def mixed(batch):
    order = [*range(1, len(batch.tokens)), 0]
    return batch.replace(tokens=batch.tokens[order], mask=batch.mask[order])


def test_it_learns_the_labels(tiny, tmp_path):
    rows = [{"prompt": f"p {i}", "completion": "good" if i % 2 else "bad", "label": i % 2} for i in range(16)]
    data = lit_rlhf.DemonstrationData(train=rows, val=rows[:6], batch_size=4)
    trainer = make_trainer(tmp_path, max_epochs=10)
    trainer.fit(make_module("KTO", tiny, lr=3e-3), data)
    metrics = trainer.callback_metrics
    assert metrics["val/accuracy"] > 0.9
    assert metrics["val/desirable_reward"] > 0 > metrics["val/undesirable_reward"]
    assert trainer.predict(trainer.lightning_module, data)[0][0].keys() == {"index", "prompt", "reward"}


def test_labels_of_a_csv_file(tiny, tmp_path):
    cells = ["true", "False", "1", "0"]
    table = "".join(f"p {i},c {i},{cell}\n" for i, cell in enumerate(cells))
    (tmp_path / "rated.csv").write_text(f"prompt,completion,label\n{table}")
    data = lit_rlhf.DemonstrationData(train=str(tmp_path / "rated.csv"), val=None, batch_size=4)
    seen = {}

    class Watched(lit_rlhf.KTO):
        def training_step(self, batch, batch_idx):
            seen.update(zip(batch.prompts.text, self.labels(batch).tolist(), strict=True))
            return super().training_step(batch, batch_idx)

    make_trainer(tmp_path, max_steps=1).fit(Watched(str(tiny)), data)
    assert seen == {"p 0": True, "p 1": False, "p 2": True, "p 3": False}


def test_labels_of_one_kind_give_a_warning(tiny, tmp_path):
    rows = [{"prompt": f"p {i}", "completion": "good", "label": True} for i in range(8)]
    data = lit_rlhf.DemonstrationData(train=rows, val=None, batch_size=4)
    with pytest.warns(
        UserWarning, match="label is true in every row of the training data: KTO is meant for both kinds"
    ):
        make_trainer(tmp_path, max_steps=1).fit(make_module("KTO", tiny), data)


@pytest.mark.parametrize(
    ("options", "rows", "message"),
    [
        ({"desirable_weight": 0.0}, None, "desirable_weight=0.0 must be a number above 0"),
        ({}, {"label": "yes"}, "label='yes' must be true or false"),
        ({}, {}, "KTO reads the column 'label', and row 0 of train_set has no columns"),
        (
            {"label_column": "liked"},
            {"label": True},
            r"KTO reads the column 'liked', and row 0 of train_set has \['label'\]",
        ),
        ({}, "one at a time", "give data.batch_size of 2 or more"),
    ],
    ids=str,
)
def test_bad_input_is_one_sentence(options, rows, message, tiny, tmp_path):
    data = make_data("KTO", batch_size=1 if rows == "one at a time" else 4)
    if isinstance(rows, dict):
        rows = [{"prompt": "p", "completion": "c", **rows} for _ in range(8)]
        data = lit_rlhf.DemonstrationData(train=rows, val=None, batch_size=4)
    with pytest.raises(InputError, match=message):
        make_trainer(tmp_path, max_steps=1).fit(make_module("KTO", tiny, **options), data)


@pytest.mark.parametrize("rows", [1, 13])
def test_validation_does_not_depend_on_the_batch_size(rows, tiny, tmp_path):
    rows = [{"prompt": f"p {i}", "completion": "good " * (i % 3 + 1), "label": i % 2} for i in range(rows)]
    module = make_module("KTO", tiny, lr=3e-2)
    make_trainer(tmp_path, max_steps=4, limit_val_batches=0).fit(module, make_data("KTO"))

    def evaluate(size: int) -> dict[str, float]:
        data = lit_rlhf.DemonstrationData(train=rows, val=rows, eval_batch_size=size)
        return make_trainer(tmp_path).validate(module, data, verbose=False)[0]

    one, *others = [evaluate(size) for size in (1, 3, 13)]
    assert one["val/loss"] != pytest.approx(0.5, abs=1e-3)
    for other in others:
        assert other == pytest.approx(one, abs=1e-4, nan_ok=True)


def test_a_loader_is_not_judged_by_an_earlier_data_module(tiny, tmp_path):
    module, trainer = make_module("KTO", tiny, lr=3e-2), make_trainer(tmp_path, max_steps=4)
    trainer.fit(module, make_data("KTO"))
    rows = [{"prompt": f"p {i}", "completion": "good " * (i % 3 + 1), "label": i % 2} for i in range(6)]
    data = lit_rlhf.DemonstrationData(train=rows, val=rows, eval_batch_size=6)
    data.tokenizer = module.tokenizer
    data.setup("validate")
    after = trainer.validate(module, dataloaders=data.val_dataloader(), verbose=False)
    fresh = make_trainer(tmp_path).validate(module, dataloaders=data.val_dataloader(), verbose=False)
    assert after == fresh


@pytest.mark.parametrize(("limit", "rows_read"), [(1, 2 * 2), (1.0, 2 * 13)])
def test_a_limited_validation_reads_no_further_rows(limit, rows_read, tiny, tmp_path):
    read = []

    class Watched(lit_rlhf.KTO):
        def log_ratios(self, batch, reference=None):
            read.append(len(batch.tokens))
            return super().log_ratios(batch, reference)

    rows = [{"prompt": f"p {i}", "completion": "good", "label": i % 2} for i in range(13)]
    data = lit_rlhf.DemonstrationData(train=rows, val=rows, eval_batch_size=2)
    make_trainer(tmp_path, limit_val_batches=limit).validate(Watched(str(tiny)), data, verbose=False)
    assert sum(read) == rows_read


@pytest.mark.parametrize(
    ("label", "message"),
    [
        ({}, "KTO reads the column 'label', and a batch has no columns"),
        ({"label": "yes"}, "a batch: label='yes' must be"),
    ],
)
def test_labels_of_a_loader_are_checked(label, message, tiny, tmp_path):
    module, rows = make_module("KTO", tiny), [{"prompt": "p", "completion": "c", **label}] * 2
    data = lit_rlhf.DemonstrationData(train=rows, val=rows)
    data.tokenizer = module.tokenizer
    data.setup("validate")
    with pytest.raises(InputError, match=message):
        make_trainer(tmp_path).validate(module, dataloaders=data.val_dataloader(), verbose=False)


def test_prediction_needs_no_labels(tiny, tmp_path):
    data = lit_rlhf.DemonstrationData(train=None, val=[{"prompt": "p", "completion": "c"}])
    rows = make_trainer(tmp_path).predict(make_module("KTO", tiny), data)
    assert rows[0][0]["reward"] == 0.0


def test_a_reference_point_is_without_gradient(tiny, tmp_path):
    seen = []

    class Centered(lit_rlhf.UnpairedAlgorithm):
        def reference_point(self, batch):
            return self.log_ratios(batch).mean()

        def completion_loss(self, log_ratios, reference_point, desirable):
            seen.append(reference_point.requires_grad)
            return F.kto_loss(log_ratios, reference_point, desirable, self.beta)

    make_trainer(tmp_path, max_steps=2).fit(Centered(str(tiny), optimizer=adam), make_data("KTO"))
    assert seen and not any(seen)


@pytest.mark.parametrize("wrong", ["mean", "column"])
@pytest.mark.parametrize("name", ["KTO.completion_loss", "DPO.pair_loss"])
def test_a_loss_has_one_term_per_row(name, wrong, tiny, tmp_path):
    algorithm, method = name.split(".")
    right = getattr(getattr(lit_rlhf, algorithm), method)

    def loss(self, *args):
        terms = right(self, *args)
        return terms.mean() if wrong == "mean" else terms.unsqueeze(1)

    module = type(algorithm, (getattr(lit_rlhf, algorithm),), {method: loss})(str(tiny), optimizer=adam)
    found = r"\(\)" if wrong == "mean" else r"\(4, 1\)"
    with pytest.raises(InputError, match=rf"{name} must return one loss per row, of shape \(4,\), not {found}"):
        make_trainer(tmp_path, max_steps=1).fit(module, make_data(algorithm, batch_size=4))
