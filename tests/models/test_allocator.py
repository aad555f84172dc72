"""Freed memory is kept on a processor: counted in page faults, each of which is new memory from the system."""

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="glibc is of Linux")

TENSORS = 20
SCRIPT = f"""
import resource, sys
from unittest.mock import Mock
import torch
from lit_rlhf.algorithms import base
from lit_rlhf.algorithms.base import Algorithm

def new_pages():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range({TENSORS}):
        torch.ones(2**24)  # 64 MiB, freed at once; up to 32 glibc keeps by itself if nothing lies behind
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

base.check_record = Mock()
method = Mock()
method.trainer.strategy.root_device = torch.device(sys.argv[1])
before = new_pages()
Algorithm.setup(method, "fit")
print(before, new_pages())
"""


def pages(device: str, **environment: str) -> tuple[int, int]:
    """New pages for tensors that are freed one after the other, before and after the setup of a method."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    command = [sys.executable, "-c", SCRIPT, device]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={**kept, **environment})
    before, after = done.stdout.split()
    return int(before), int(after)


def test_tensors_take_the_memory_of_those_that_were_freed():
    before, after = pages("cpu")
    assert after < before / 4


@pytest.mark.parametrize(
    ("device", "environment"), [("cuda", {}), ("cpu", {"MALLOC_TRIM_THRESHOLD_": "131072"})], ids=["gpu", "users"]
)
def test_nothing_changes_for_an_accelerator_or_against_the_user(device, environment):
    before, after = pages(device, **environment)
    assert after > before / 2
