"""Strategies and launchers whose processes would not train one model together are refused."""

import pytest
import torch
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    SingleDeviceXLAStrategy,
    XLAStrategy,
)

import lit_rlhf
from lit_rlhf.training.checks import check_processes
from runs import make_data, make_module, make_trainer


class OwnDDP(DDPStrategy):
    pass


def check(kind, world_size=1, devices=1, nodes=1):
    check_processes(kind.__new__(kind), world_size, devices, nodes)


@pytest.mark.parametrize(
    "kind", [DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy, SingleDeviceXLAStrategy, XLAStrategy]
)
def test_strategy_that_shards_or_compiles_is_refused(kind):
    with pytest.raises(ValueError, match=rf"strategy {kind.__name__} is not supported: use --trainer.strategy fsdp2"):
        check(kind)


@pytest.mark.parametrize("method", ["spawn", "fork", "forkserver"])
def test_processes_that_do_not_return_what_they_trained_are_refused(method):
    with pytest.raises(ValueError, match=rf"started by {method} .* use --trainer.strategy ddp"):
        check_processes(DDPStrategy(start_method=method), 2, 2, 1)


@pytest.mark.parametrize("kind", [DDPStrategy, OwnDDP, SingleDeviceStrategy])
def test_single_device_and_ddp_are_allowed(kind):
    check(kind)


@pytest.mark.parametrize("name", ["RLOO", "SFT"])
def test_launcher_with_another_number_of_processes_is_refused(name, tiny, tmp_path, monkeypatch):
    """As `torchrun --nproc-per-node 2` with one device: two runs in one folder."""
    for variable, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(variable, value)
    module = make_module(name, tiny)
    with pytest.raises(ValueError, match=r"started 2 processes, and the Trainer has devices=1 x num_nodes=1: set"):
        make_trainer(tmp_path, max_steps=1).fit(module, make_data(name))
    assert "policy" not in module._modules


@pytest.mark.parametrize(
    ("environment", "refused"), [("2", True), ("4", False), ("8", True)], ids=["fewer", "as many", "more"]
)
def test_launched_processes_are_devices_times_nodes(environment, refused, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", environment)
    options = dict(world_size=int(environment), devices=2, nodes=2)
    if refused:
        with pytest.raises(ValueError, match=r"devices=2 x num_nodes=2"):
            check(DDPStrategy, **options)
    else:
        check(DDPStrategy, **options)


def test_variables_that_lightning_leaves_are_no_launcher(monkeypatch):
    """Of a run with two devices, after which the first process evaluates alone."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "0")
    check(SingleDeviceStrategy)


class WithForgottenHead(lit_rlhf.SFT):
    def configure_model(self):
        super().configure_model()
        self.head = torch.nn.Linear(2, 1)

    def parameter_groups(self):
        return [{"name": "policy", "params": list(self.policy.parameters())}]


class WithForeignParameter(lit_rlhf.SFT):
    def parameter_groups(self):
        self.hidden = [torch.nn.Linear(2, 1)]  # a list hides it from the module
        return [*super().parameter_groups(), {"name": "head", "params": list(self.hidden[0].parameters())}]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (WithForgottenHead, r"'head.weight' \(2 in all\) is trainable, but in no parameter group"),
        (WithForeignParameter, r"parameter_groups returns 2 parameters, .* no checkpoint would hold them"),
    ],
)
def test_parameter_outside_the_optimizer_or_the_module_is_refused(kind, message, tiny, tmp_path):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, max_steps=1).fit(kind(str(tiny)), make_data("SFT"))
