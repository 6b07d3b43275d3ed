"""What kernels that are launched early read before they wait: nothing that the kernel ahead of them wrote."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


def test_what_is_read_before_the_wait() -> None:
    here = Path(__file__)
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = str(here.parents[2])
    command = [sys.executable, str(here.with_name("lowered.py"))]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {
        "stream": ["bias", "w"],
        "stream, gated": ["bias", "w"],
        "stream, parts": ["bias", "w"],
        "walk": ["w"],
        "tile": ["w"],
        "sum": ["bases"],
        "product, sum": ["bases", "w"],
        "products, sum": ["w"],
        "attend": ["k", "positions", "v"],
        "attend, groups": ["k", "positions", "v"],
    }
