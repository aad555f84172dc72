"""Runtime type checker of the tests: accepts an int where a float is annotated, as static checkers do (PEP 484)."""

from beartype import BeartypeConf, beartype

typechecked = beartype(conf=BeartypeConf(is_pep484_tower=True))
