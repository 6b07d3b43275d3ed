"""What tests of kernels stand on."""

import os

import pytest
import torch

from fms.kernels import skinny


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """A CPU on which Triton's interpreter runs the kernels."""
    pytest.importorskip("triton")
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("TRITON_INTERPRET=1 is not set")
    device = torch.device("cpu")
    monkeypatch.setitem(skinny._machines, device, skinny.Machine(4, False))
    return device
