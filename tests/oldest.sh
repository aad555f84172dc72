#!/bin/bash
# Run the tests of the models with the oldest versions that pyproject.toml allows: bash tests/oldest.sh FOLDER
# FOLDER gets a virtual environment of these versions; one that is there is used again.
set -euo pipefail
folder=$(realpath -m "${1:?give a folder for the virtual environment}")
cd "$(dirname "$0")/.."
if [ ! -x "$folder/bin/python" ]; then
    python3 -m venv "$folder"
    python3 - > "$folder/oldest.txt" <<'PYTHON'
import tomllib
from pathlib import Path

project = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]
extras = [r for name in ("plot", "sentiment", "test") for r in project["optional-dependencies"][name]]
print("\n".join(r.replace(">=", "==") for r in project["dependencies"]))
print("\n".join(r for r in extras if not r.startswith("lit_rlhf")))
PYTHON
    "$folder/bin/pip" install --quiet --requirement "$folder/oldest.txt"
fi
PYTHONPATH=$PWD "$folder/bin/python" -m pytest tests/models -q -p no:cacheprovider
