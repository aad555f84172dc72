"""The package list of pyproject.toml is complete: a missing package breaks the wheel but not the checkout."""

import tomllib
from pathlib import Path

import lit_rlhf

ROOT = Path(__file__).parents[1]


def test_every_package_is_listed():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = [ROOT / "lit_rlhf", *(path for path in (ROOT / "lit_rlhf").rglob("*") if path.is_dir())]
    found = {".".join(path.relative_to(ROOT).parts) for path in folders if (path / "__init__.py").is_file()}
    assert found | {"lit_rlhf.callbacks", "lit_rlhf.configs"} == set(listed)


def test_callbacks_and_configs_link_to_the_top_level_folders():
    for name in ("callbacks", "configs"):
        assert (ROOT / "lit_rlhf" / name).resolve() == ROOT / name


def test_version_matches_pyproject():
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"] == lit_rlhf.__version__
