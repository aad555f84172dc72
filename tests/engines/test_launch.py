"""A vLLM server that a run starts: it is given what it needs, and ends with the run, however that ends."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

import fake_vllm
from lit_rlhf import Engine
from lit_rlhf.algorithms import base
from lit_rlhf.engines import supervisor
from lit_rlhf.engines.launch import WORKER
from lit_rlhf.errors import InputError
from runs import make_data, make_module, make_trainer


@pytest.fixture
def vllm(tmp_path, monkeypatch):
    """A command that serves as vLLM does."""
    command = tmp_path / "bin" / "vllm"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec {sys.executable} {fake_vllm.__file__} "$@"\n')
    command.chmod(0o755)
    monkeypatch.setenv("FAKE_VLLM_RECORD", str(tmp_path / "record.json"))
    monkeypatch.setenv("MASTER_ADDR", "somewhere")
    return str(command)


def fit(folder, root, **engine):
    module = make_module("RLOO", folder, engine=Engine(folder=str(root / "handed_over"), **engine))
    trainer = make_trainer(root, max_steps=2)
    trainer.fit(module, make_data("RLOO"))
    return trainer


def is_running(pid):
    status = Path(f"/proc/{pid}/status")
    return status.exists() and "State:\tZ" not in status.read_text()


def wait_for_end(pid, seconds=30):
    end = time.monotonic() + seconds
    while is_running(pid):
        assert time.monotonic() < end, f"process {pid} is still there"
        time.sleep(0.05)


def test_a_run_starts_its_server_and_ends_it(tiny, vllm, tmp_path):
    trainer = fit(tiny, tmp_path, start=vllm, arguments=["--seed", "5"], environment={"CUDA_VISIBLE_DEVICES": "7"})
    assert trainer.callback_metrics["train/logprob_mismatch"] < 1e-5 and trainer.callback_metrics["val/length"] > 0
    record = json.loads((tmp_path / "record.json").read_text())
    given = record["arguments"]
    assert given[0] == "serve" and given[-2:] == ["--seed", "5"] and "--enable-sleep-mode" not in given
    assert {"processed_logprobs", "lit_rlhf_worker.WeightRenewal"} <= set(given)
    environment = record["environment"]
    assert environment["CUDA_VISIBLE_DEVICES"] == "7" and environment["VLLM_SERVER_DEV_MODE"] == "1"
    assert environment["PYTHONPATH"] == str(WORKER) and "MASTER_ADDR" not in environment
    wait_for_end(record["pid"], seconds=0.1)
    assert (Path(trainer.default_root_dir) / "vllm.log").is_file() and not Path(given[1]).exists()


def test_a_server_ends_with_a_run_that_fails_and_a_further_run_starts_another(tiny, vllm, tmp_path):
    def fails(completions, **kwargs):
        if not healed:
            raise ValueError("no judge today")
        return [0.0] * len(completions)

    def pid():
        return json.loads((tmp_path / "record.json").read_text())["pid"]

    healed = []
    module = make_module("RLOO", tiny, engine=Engine(start=vllm, folder=str(tmp_path / "handed_over")), rewards=[fails])
    with pytest.raises(RuntimeError, match="no judge today"):
        make_trainer(tmp_path, max_steps=1).fit(module, make_data("RLOO", val=None))
    first = pid()
    wait_for_end(first, seconds=0.1)
    healed.append(True)
    make_trainer(tmp_path, max_steps=1).fit(module, make_data("RLOO", val=None))
    assert pid() != first and not list((tmp_path / "handed_over").iterdir())


def test_a_started_server_that_dies_is_one_sentence_at_once(tiny, vllm, tmp_path):
    def kill(completions, **kwargs):
        os.kill(json.loads((tmp_path / "record.json").read_text())["pid"], signal.SIGKILL)
        return [0.0] * len(completions)

    module = make_module("RLOO", tiny, engine=Engine(start=vllm, backoff=1000.0), rewards=[kill])
    message = r"engine.start: .* can't be reached .*server that the run started has ended with exit code 137, and has"
    with pytest.raises(InputError, match=message):
        make_trainer(tmp_path, max_steps=2).fit(module, make_data("RLOO", val=None))


def test_a_server_sleeps_between_rollouts(tiny, tmp_path):
    server = fake_vllm.FakeVLLM(tiny)
    fit(tiny, tmp_path, url=server.url, sleep=True, retries=0)
    assert server.asleep and server.naps == 4  # two rollouts and two validations


def test_a_server_that_does_not_start_is_one_sentence(tiny, vllm, tmp_path):
    message = r"engine.start: .*vllm ended with exit code 1 before it answered .no memory for the cache.; its output is"
    with pytest.raises(InputError, match=message):
        fit(tiny, tmp_path, start=vllm, arguments=["--fail"])
    with pytest.raises(InputError, match=r"did not answer within 0.01 s .engine.startup_timeout.; its output is in"):
        fit(tiny, tmp_path, start=vllm, startup_timeout=0.01)
    assert not list((tmp_path / "handed_over").iterdir())


@pytest.mark.parametrize(
    "ending", ["os.kill(os.getpid(), 9)", "sys.exit()", "os.fork() or time.sleep(99); os.kill(os.getpid(), 9)"]
)
def test_what_is_supervised_ends_with_the_process_that_started_it(ending, tmp_path):
    child = (
        "import os, signal, time; signal.signal(15, signal.SIG_IGN); print(os.getpid(), flush=True); time.sleep(600)"
    )
    parent = f"""
        import os, subprocess, sys, time
        command = [sys.executable, "-I", {supervisor.__file__!r}, sys.executable, "-c", {child!r}]
        started = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
        print(started.stdout.readline().decode(), flush=True)
        {ending}
    """
    command = [sys.executable, "-c", textwrap.dedent(parent)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as started:
        wait_for_end(int(started.stdout.readline()))
        with contextlib.suppress(ProcessLookupError):  # a fork that holds the pipes
            os.killpg(started.pid, signal.SIGKILL)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start": "no-such-vllm"}, "engine.start='no-such-vllm' is no command here: give the path of `vllm`"),
        ({"start": sys.executable, "url": "http://a:1"}, "url is a server that runs, and start starts one"),
        ({"arguments": ("--seed=1",)}, "arguments is for a server that the run starts: give engine.start, too"),
        ({"sleep": True}, "sleep is for a server: give engine.url or start, too"),
        ({"start": sys.executable, "startup_timeout": 0}, "startup_timeout=0 must be above 0 seconds"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(InputError) as raised:
        Engine(**options)
    assert message in str(raised.value)


def test_several_machines_are_refused(tiny, vllm, tmp_path, monkeypatch):
    module, trainer = make_module("RLOO", tiny, engine=Engine(start=vllm)), make_trainer(tmp_path, max_steps=1)
    monkeypatch.setattr(type(trainer), "num_nodes", 2)
    monkeypatch.setattr(base, "check_processes", lambda *args: None)  # there is one machine here
    with pytest.raises(InputError, match="start it yourself, and give"):
        trainer.fit(module, make_data("RLOO"))
