"""What is said when a checkpoint is not what it should be."""

from collections.abc import Iterable
from difflib import get_close_matches


class CheckpointError(ValueError):
    """A file or directory of weights that cannot be loaded: names the file, what it has and what is required."""


def nearest(word: str, choices: Iterable[str]) -> str:
    """A hint to end an error with: the closest valid choice, or nothing."""
    found = get_close_matches(str(word), list(choices), n=1, cutoff=0.5)
    return f" (did you mean {found[0]!r}?)" if found else ""
