import pytest

from comparisons import FakeRuns


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return tmp_path


@pytest.fixture
def unchecked(monkeypatch):
    """Leave the arguments of the arms unchecked."""
    monkeypatch.setattr("lit_rlhf.comparison.compare.check_arguments", lambda *args: None)


@pytest.fixture
def fake_runs(monkeypatch, unchecked):
    fake = FakeRuns()
    monkeypatch.setattr("lit_rlhf.comparison.runs.run_logged", fake.run_logged)
    return fake
