"""A disk that is full, for the tests: the operating system itself refuses to write."""

import contextlib
import resource


@contextlib.contextmanager
def largest_file(size):
    """Let files grow to `size` bytes and no further, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
