"""The type checker of the tests: an int is fine where a float is expected, as for every other tool."""

from beartype import BeartypeConf, beartype

typechecked = beartype(conf=BeartypeConf(is_pep484_tower=True))
