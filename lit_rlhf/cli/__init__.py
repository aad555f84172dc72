"""The command line `lit-rlhf`."""

from lit_rlhf.cli.main import main, parse_error

__all__ = ["main", "parse_error"]
