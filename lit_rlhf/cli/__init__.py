"""The command line `lit-rlhf`."""

from lit_rlhf.cli.main import main

__all__ = ["main"]
