"""What `--ckpt_path` may name, and what a damaged or foreign file does: one sentence."""

import csv
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from commands import fit
from lit_rlhf.callbacks import checkpoint
from lit_rlhf.cli import main
from lit_rlhf.cli.checkpoints import resolve_checkpoint
from lit_rlhf.cli.run_files import EventsLogger
from lit_rlhf.errors import InputError
from lit_rlhf.training.files import claim_folder, is_removed, remove_leftovers


def save(path: Path, step: int, saved_at: float, **more) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"state_dict": {"w": torch.ones(500)}, "global_step": step, "epoch": 0, "export": {}}
    torch.save({**content, "saved_at": saved_at, **more}, path)
    return path


def test_last_is_the_whole_checkpoint_that_was_saved_last(tmp_path):
    first = save(tmp_path / "version_0/checkpoints/last.ckpt", step=9, saved_at=10.0)
    second = save(tmp_path / "version_1/checkpoints/last.ckpt", step=4, saved_at=20.0)
    os.utime(second, (0, 0))  # a copy may lose the times of files
    save(tmp_path / "version_1/checkpoints/partial-last.ckpt", step=5, saved_at=30.0)
    assert resolve_checkpoint("last", tmp_path) == second
    content = bytearray(second.read_bytes())
    content[content.index(b"\x00\x00\x80\x3f" * 9) + 400] ^= 1  # one bit of a weight
    second.write_bytes(content)
    with pytest.warns(UserWarning, match=r"skipped, .*version_1.* damaged"):
        assert resolve_checkpoint("last", tmp_path) == first
    first.write_bytes(first.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"no checkpoint in .* is whole"):
        resolve_checkpoint("last", tmp_path, may_be_missing=True)
    assert resolve_checkpoint("last", tmp_path / "new", may_be_missing=True) is None


def test_best_says_what_is_kept(tmp_path):
    def state(step):
        return {"callbacks": {"PolicyCheckpoint": {"best_step": step, "best_path": "runs/policy/best"}}}

    path = save(tmp_path / "version_0/checkpoints/last.ckpt", step=9, saved_at=1.0, **state(9))
    assert resolve_checkpoint("best", tmp_path) == path
    save(path, step=9, saved_at=1.0, **state(3))
    with pytest.raises(InputError, match=r"of update 3, the best, only the policy is kept: give --model\.policy"):
        resolve_checkpoint("best", tmp_path)


class Code:
    def __reduce__(self):
        return os.mkdir, ("ran",)


def wrong_file(kind: str, folder: Path) -> Path:
    path = folder / "given.ckpt"
    if kind == "a missing file":
        return path
    if kind == "a folder":
        return save(folder / "version_0/checkpoints/last.ckpt", 1, 1.0).parents[2]
    if kind == "a model's folder":
        (folder / "config.json").write_text("{}")
        return folder
    if kind == "an empty file":
        path.touch()
    elif kind == "text":
        path.write_text("weights\n" * 50)
    elif kind == "a plain state dict":
        torch.save({"w": torch.ones(2)}, path)
    elif kind == "of another program":
        torch.save({"state_dict": {}, "global_step": 1, "epoch": 0}, path)
    elif kind == "code":
        torch.save({"state_dict": Code()}, path)
    return path


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        ("a missing file", "there is no such file"),
        ("a folder", "is a folder: give a file, such as .*last.ckpt"),
        ("a model's folder", "is the folder of a model, not a checkpoint: start from it by --model.policy"),
        ("an empty file", "is an empty file"),
        ("text", "is not a checkpoint, or a damaged one"),
        ("a plain state dict", "is not a training checkpoint"),
        ("of another program", "was not written by lit_rlhf"),
        ("code", "holds more than tensors and plain data"),
    ],
)
def test_a_file_that_is_no_checkpoint_gets_a_sentence(kind, sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=sentence):
        resolve_checkpoint(str(wrong_file(kind, tmp_path)), tmp_path)
    assert not Path("ran").exists()


def test_no_value_of_a_checkpoint_reaches_the_configuration(workspace):
    fit()
    path = Path("here/version_0/checkpoints/last.ckpt")
    content = torch.load(path, weights_only=True)
    reward = {"class_path": "os.mkdir", "init_args": {"path": "ran"}}
    content["hyper_parameters"] = {"class_path": "RLOO", "init_args": {"rewards": [reward]}}
    torch.save(content, "shared.ckpt")
    fit("--trainer.max_steps=3", "--ckpt_path=shared.ckpt")
    assert not Path("ran").exists() and "os.mkdir" not in Path("here/version_1/config.yaml").read_text()


def test_every_command_takes_last(workspace):
    fit()
    fit("--trainer.max_steps=3", "--ckpt_path=last")
    with Path("here/version_1/metrics.csv").open() as file:
        assert [row["step"] for row in csv.DictReader(file) if row["train/loss"]] == ["2"]
    common = Path("here/version_1/config.yaml")
    main(["test", f"--config={common}", "--ckpt_path=last"])
    main(["export", "--ckpt_path=last", "--out=exported", "--default_root_dir=here"])
    assert Path("exported").is_dir()
    assert sorted(path.name for path in Path("here").iterdir()) == ["policy", "test_0", "version_0", "version_1"]


def test_another_algorithm_or_start_is_refused(workspace, capsys):
    fit("--model.lora=null")
    last = "--ckpt_path=here/version_0/checkpoints/last.ckpt"
    for args, sentence in (
        (["--model=PPO"], "written by RLOO, and this run is PPO"),
        (["--model.policy=here/policy/last"], "started from a policy, or a reference, with other weights"),
    ):
        with pytest.raises(SystemExit):
            fit("--model.lora=null", *args, last)
        assert sentence in capsys.readouterr().err


@pytest.mark.parametrize(
    "logger", ["false", "{class_path: CSVLogger, init_args: {save_dir: here}}", "{class_path: places.Service}"]
)
def test_runs_are_kept_apart_whatever_the_logger(logger, workspace):
    Path("places.py").write_text(
        "from pathlib import Path\nfrom lightning.pytorch.loggers.logger import DummyLogger\n\n"
        "class Service(DummyLogger):\n    def __init__(self, save_dir: str = '.'):\n        super().__init__()\n"
        "        Path(save_dir, 'service').mkdir(parents=True, exist_ok=True)\n"
    )
    before = {path.name for path in workspace.iterdir()}
    for _ in range(2):
        fit(f"--trainer.logger={logger}")
    assert {path.name for path in workspace.iterdir()} - before - {"__pycache__"} == {"here"}
    for version in ("version_0", "version_1"):
        names = {path.name for path in Path("here", version).iterdir()}
        assert {"config.yaml", "samples.jsonl", "checkpoints"} <= names
        assert ("metrics.csv" in names) == ("CSV" in logger)


CLAIM = "import sys; from pathlib import Path; from lit_rlhf.training.files import *; print(claim_folder(Path('root')))"


def test_processes_that_start_together_never_share_a_folder(tmp_path):
    command = [sys.executable, "-c", f"import torch; sys=__import__('sys'); sys.stdin.readline(); {CLAIM}"]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=tmp_path)
    processes = [subprocess.Popen(command, **pipes) for _ in range(3)]
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    folders = [process.communicate()[0].strip() for process in processes]
    assert sorted(folders) == [f"root/version_{i}" for i in range(3)]


def test_leftovers_of_dead_runs_are_removed_and_a_complete_policy_takes_its_place(tmp_path):
    dead, alive = tmp_path / "version_0", claim_folder(tmp_path / "other")
    for folder in (dead, alive):
        (folder / "checkpoints").mkdir(parents=True)
        (folder / "checkpoints" / "partial-last.ckpt").touch()
        (folder / "checkpoints" / "last.ckpt").touch()
    for part in (".last-a/new/config.json", ".last-a/old/config.json", ".best-b/new/half", "best/config.json", "mine"):
        (tmp_path / "policy" / part).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "policy" / part).write_text(part)
    remove_leftovers(tmp_path)
    assert [path.name for path in (dead / "checkpoints").iterdir()] == ["last.ckpt"]
    assert sorted(path.name for path in (tmp_path / "policy").iterdir()) == ["best", "last", "mine"]
    assert (tmp_path / "policy/last/config.json").read_text() == ".last-a/new/config.json"
    remove_leftovers(tmp_path / "other")
    assert (alive / "checkpoints" / "partial-last.ckpt").exists() and not is_removed(alive)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning", "ignore:TensorBoard's events")
def test_a_run_whose_folder_is_removed_ends_with_a_sentence(workspace, capsys):
    Path("removing.py").write_text(
        "import shutil\nfrom lightning.pytorch import Callback\n\nclass Remove(Callback):\n"
        "    def on_train_batch_start(self, *args):\n        shutil.rmtree('here/version_0', ignore_errors=True)\n"
    )
    with pytest.raises(SystemExit) as stopped:
        fit("--trainer.callbacks+=removing.Remove")
    assert stopped.value.code == 1
    assert "the folder of this run, 'here/version_0', was removed or moved" in capsys.readouterr().err
    assert Path("here/version_0/checkpoints/last.ckpt").is_file()  # nothing is lost


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_events_that_cannot_be_written_end_no_run(tmp_path):
    """Whoever writes through the logger: its metrics, a callback's text, or the end of the run."""
    logger = EventsLogger(tmp_path, name="", version="run")
    logger.experiment.add_text("samples", "first", 0)
    logger.save()
    shutil.rmtree(tmp_path / "run")
    logger.experiment.add_text("samples", "lost", 1)
    thread = logger.experiment.file_writer.event_writer._async_writer._worker
    with pytest.warns(UserWarning, match=r"events can't be written \(No such file or directory\)") as caught:
        while not caught.list:  # the thread of the writer notices it
            thread.join(0.01)
            logger.experiment.add_text("samples", "lost", 2)
        logger.log_metrics({"reward": 1.0}, 3)
        logger.experiment.add_histogram("rewards", torch.arange(3.0), 3)
        logger.finalize("success")
    assert len(caught) == 1


def test_a_clock_that_is_set_back_hides_no_checkpoint(workspace, monkeypatch):
    fit("--trainer.max_steps=1")
    now = time.time()
    monkeypatch.setattr(checkpoint.time, "time", lambda: now - 86400)
    fit("--trainer.max_steps=2", "--ckpt_path=last")
    assert resolve_checkpoint("last", Path("here")) == Path("here/version_1/checkpoints/last.ckpt")


@pytest.mark.parametrize("root", ["s3://bucket/runs", "file:///runs"])
def test_a_root_that_is_no_folder_is_refused(root, workspace, capsys):
    before = set(workspace.iterdir())
    with pytest.raises(SystemExit):
        fit(f"--trainer.default_root_dir={root}")
    assert "is no folder of a file system" in capsys.readouterr().err
    assert set(workspace.iterdir()) - before <= {workspace / "__pycache__"}
