"""The pool of ranks, as in tests/distributed."""

from tests.distributed.conftest import ranks  # noqa: F401
