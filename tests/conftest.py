"""What every test stands on: one thread, no Hub, fixed seeds, and the real models."""

import os
import random
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import hypothesis
import pytest

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported, here and in the processes that tests start
os.environ["HF_HUB_OFFLINE"] = "1"

hypothesis.settings.register_profile("fms", deadline=None, derandomize=True)
hypothesis.settings.load_profile("fms")


collect_ignore = [  # where nothing can be installed, what stands on a test-only package is left out
    f"utils/test_{name}.py"
    for name, package in (("checkpoint", "gguf"), ("gguf", "gguf"), ("tokenizers", "mistral_common"))
    if find_spec(package) is None
]


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("torch finds no GPU")
    if item.get_closest_marker("peer") and not os.environ.get("FMS_PEER_PYTHON"):
        pytest.skip("FMS_PEER_PYTHON names no Python that has the existing FMS")


@pytest.fixture(autouse=True)
def seed() -> None:
    random.seed(0)
    if torch := sys.modules.get("torch"):
        torch.manual_seed(0)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct, a GGUF file; fetched once, by whichever test process comes first."""
    import dev

    return dev.fetch(dev.SMOLLM2, sys.executable)


@pytest.fixture(scope="session")
def minilm() -> Path:
    """all-MiniLM-L6-v2, a directory as sentence-transformers lays one out; fetched once likewise."""
    import dev

    return dev.fetch(dev.MINILM, sys.executable)


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A CPU on which Triton's interpreter runs the kernels."""
    pytest.importorskip("triton")
    import torch

    from fms.kernels import launching

    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("TRITON_INTERPRET=1 is not set")
    device = torch.device("cpu")
    monkeypatch.setitem(launching._machines, device, launching.Machine(4, False))
    return device
