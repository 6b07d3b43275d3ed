"""Run by a Python that has ibm-fms: what its models make of given token ids, one case after the other.

    python run_ibm_fms.py CASES.json

A case is {"architecture", "variant", "config", "weights", "read", "out"}. With "read" false the model gets random
weights, written to the file "weights"; with true its own `get_model` loads the directory "weights". Logits and greedy
tokens go to the file "out".
"""

import json
import sys
from pathlib import Path

import torch

from fms.models import get_model
from fms.utils.generation import generate

IDS = torch.arange(48).view(2, 24)
NEW_TOKENS = 24


def make(case: dict) -> torch.nn.Module:
    model = get_model(case["architecture"], case["variant"], **case["config"])
    torch.manual_seed(0)
    for parameter in model.parameters():  # of a tied pair one
        parameter.normal_(mean=float(parameter.dim() == 1), std=0.2)
    torch.save(model.state_dict(), case["weights"])
    return model


def read(case: dict) -> torch.nn.Module:
    from safetensors.torch import load_file

    model = get_model(case["architecture"], case["variant"], model_path=case["weights"], **case["config"])
    file = load_file(Path(case["weights"]) / "model.safetensors")
    state = model.state_dict()
    assert state.keys() == file.keys(), state.keys() ^ file.keys()  # it would say nothing
    assert all(torch.equal(state[name], tensor) for name, tensor in file.items())
    return model


@torch.no_grad()
def main(cases: list[dict]) -> None:
    for case in cases:
        model = (read if case["read"] else make)(case).eval()
        tokens = generate(model, IDS, max_seq_len=64, max_new_tokens=NEW_TOKENS, do_sample=False, use_cache=True)
        torch.save({"ids": IDS, "logits": model(IDS), "tokens": tokens}, case["out"])


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
