"""The data set that is there by default: the Alpaca instructions, fetched once into the cache folder."""

import contextlib
import fcntl
import logging
import os
import urllib.request
from pathlib import Path

ALPACA = "https://raw.githubusercontent.com/tatsu-lab/stanford_alpaca/main/alpaca_data.json"
logger = logging.getLogger(__name__)


def cache_directory() -> Path:
    """$FMS_CACHE, or fms in the user's cache directory."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("FMS_CACHE") or f"{base}/fms").expanduser().absolute()


def alpaca() -> Path:
    """52,000 instructions with answers (Taori 2023; CC BY-NC 4.0: not for commercial use).

    Raises `ValueError` that names --dataset_path where it cannot be had.
    """
    file = cache_directory() / "alpaca_data.json"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        held = os.open(file.parent, os.O_RDONLY)
        try:
            fcntl.flock(held, fcntl.LOCK_EX)  # the ranks of a machine begin together: one of them fetches
            if not file.exists():
                _fetch(file)
        finally:
            os.close(held)
    except OSError as error:
        raise ValueError(
            f"the Alpaca instructions could not be had from {ALPACA}: {getattr(error, 'reason', error)}; "
            "name a file of your own: --dataset_path FILE (path=FILE)"
        ) from error
    return file


def _fetch(file: Path) -> None:
    logger.warning("no path is given: fetching the Alpaca instructions (23 MB, CC BY-NC 4.0) into %s, once", file)
    part = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        with urllib.request.urlopen(ALPACA, timeout=30) as answer, part.open("wb") as out:
            while block := answer.read(1 << 20):
                out.write(block)
        if part.stat().st_size != int(answer.headers.get("Content-Length") or part.stat().st_size):
            raise OSError("its end is missing")
        os.replace(part, file)
    finally:
        with contextlib.suppress(FileNotFoundError):
            part.unlink()
