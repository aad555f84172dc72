"""No method mixes tensors of the device with tensors of the host, and checkpoints hold none of the device's."""

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.strategies import SingleDeviceStrategy
from transformers import AutoModelForSequenceClassification

import lit_rlhf
from lit_rlhf import callbacks
from pretended_device import DEVICE, PretendedDevice, tensors_of
from runs import METHODS, ONLINE, make_data, make_module, make_trainer
from tiny import make_llama, make_tokenizer


class SaveInside(Callback):
    """Saves after a step inside an update and a rollout, and looks for the device's tensors in the checkpoint."""

    def __init__(self, device: PretendedDevice, step: int, path) -> None:
        self.device, self.step, self.path, self.held = device, step, path, []

    def on_train_batch_end(self, trainer, module, *args) -> None:
        assert all(self.device.holds(p) for p in module.parameters())
        if trainer.fit_loop.epoch_loop.batch_progress.current.ready == self.step:
            trainer.save_checkpoint(self.path)

    def on_save_checkpoint(self, trainer, module, checkpoint) -> None:
        own = {name: value for name, value in checkpoint.items() if name not in ("state_dict", "optimizer_states")}
        self.held += [tensor.shape for tensor in tensors_of(own) if self.device.holds(tensor)]


def options_of(name: str) -> dict:
    if name not in ONLINE:
        return {}
    return dict(num_minibatches=4, stop=["ab", "<eos>"], top_k=200)


@pytest.fixture(scope="session")
def judge(tmp_path_factory):
    """Folder of a reward model."""
    folder, tokenizer = tmp_path_factory.mktemp("judge"), make_tokenizer()
    config = make_llama(len(tokenizer)).config
    config.num_labels = 1
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", METHODS)
def test_no_operation_mixes_devices(name, ending, tmp_path, record_property):
    fit_and_resume(name, ending, tmp_path, record_property, options_of(name))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["RLOO", "PPO", "DPO"])
def test_nor_with_offloaded_models(name, ending, judge, tmp_path, record_property):
    options = {**options_of(name), "offload_reference": True}
    if name in ONLINE:
        options["rewards"] = [lit_rlhf.RewardModel(judge, offload=True)]
    if name == "PPO":
        options["offload_critic"] = True
    module = fit_and_resume(name, ending, tmp_path, record_property, options)
    waiting = [module.reference.copy]
    if name in ONLINE:
        waiting.append(module.scorer._specs[0].reward._scorer)
    assert all(parameter.device != DEVICE for model in waiting for parameter in model.parameters())


def fit_and_resume(name, ending, tmp_path, record_property, options):
    with PretendedDevice() as device:
        inside = tmp_path / "inside.ckpt"
        for resumed in (None, inside):
            saving = SaveInside(device, 3 if name in ONLINE else 1, inside)
            observers = [callbacks.KLMonitor(), callbacks.GradientNoise()] if name in ONLINE else []
            strategy = SingleDeviceStrategy(DEVICE, accelerator=CPUAccelerator())
            trainer = make_trainer(
                tmp_path,
                strategy=strategy,
                accelerator="auto",
                max_epochs=1,
                accumulate_grad_batches=2,
                limit_val_batches=0 if resumed else 1,
                callbacks=[*observers, saving],
            )
            module = make_module(name, ending, **options)
            trainer.fit(module, make_data(name, rows=4 if name in ONLINE else 8), ckpt_path=resumed)
            assert not saving.held
        record_property("host_syncs", device.syncs)
        assert not device.findings, "\n".join(dict.fromkeys(device.findings))
        assert device.syncs > 0
        return module


def test_a_mixed_operation_is_found():
    with PretendedDevice() as device:
        here, host = torch.ones(2, device=DEVICE), torch.ones(2)
        here * 2 + torch.tensor(1.0) + host.to(DEVICE)
        assert here.device == DEVICE and (here.cpu() + host).device != DEVICE
        assert not device.findings
        here + host
        torch.tensor([1.0, 2.0], device=DEVICE) * host
        host[here.long()]
        here.numpy()
    assert [finding.split(" at ")[0] for finding in device.findings] == [
        "aten.add.Tensor",
        "aten.mul.Tensor",
        "aten.index.Tensor",
        "numpy",
    ]
