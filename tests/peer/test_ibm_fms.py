"""The existing FMS, in an environment of its own: its files are read here, ours there, and both say the same.

    FMS_PEER_PYTHON=.../bin/python python dev.py test -m peer -n 0 -rP

where that Python has torch, transformers, sentencepiece and, installed with --no-deps, ibm-fms.
"""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch

from fms.models import Decoder, freeze, get_model
from fms.models.convert import save_model
from fms.modules.positions import RopeScaling
from fms.utils.generation import generate

pytestmark = pytest.mark.peer

SIZES = {
    "src_vocab_size": 67,
    "emb_dim": 32,
    "nheads": 4,
    "kvheads": 4,
    "nlayers": 3,
    "max_expected_seq_len": 64,
}
THEIRS = SIZES | {"hidden_grow_factor": 1.5, "multiple_of": 1}
OURS = SIZES | {"hidden_dim": 48, "head_dim": 8}
BIASED = {"attn_bias": True, "mlp_bias": True, "tie_heads": True}
LLAMA3 = RopeScaling("llama3", factor=8.0, original_max_len=16)
THEIR_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
MULTIPLIERS = {
    "embedding_multiplier": 3.0,
    "logits_scaling": 0.8,
    "residual_multiplier": 0.7,
    "attention_multiplier": 0.3,
}
CASES: dict[str, tuple[str, dict, dict]] = {  # architecture, ours, theirs
    "mha": ("llama", {}, {}),
    "gqa": ("llama", {"kvheads": 2}, {}),
    "mqa, theta": ("llama", {"kvheads": 1, "rope_theta": 500.0}, {}),
    "tied, biased": ("llama", {"kvheads": 2, **BIASED}, {}),
    "llama3": ("llama", {"kvheads": 2, "rope_scaling": LLAMA3}, {"rope_scaling": THEIR_LLAMA3}),
    "granite": ("granite", {"kvheads": 2, "tie_heads": True, **MULTIPLIERS}, {"head_dim": 8}),
    "granite, head_dim": ("granite", {"kvheads": 2, "tie_heads": False, "head_dim": 12, **MULTIPLIERS}, {}),
    "granite 4": ("granite_moe_hybrid", {"kvheads": 2, "pad_id": None, **MULTIPLIERS}, {"head_dim": 8, "pad_id": -1}),
    "mistral": ("mistral", {"kvheads": 2, "head_dim": 12}, {}),
    "qwen3": ("qwen3", {"kvheads": 2, "head_dim": 12, "tie_heads": False}, {}),
    # where pad_id is a token, theirs gives it no position
    "gpt_bigcode, mqa": ("gpt_bigcode", {"kvheads": 1, "pad_id": None}, {"pad_id": -1}),
    "gpt_bigcode, mha": ("gpt_bigcode", {"pad_id": None}, {"pad_id": -1, "multiquery_attn": False}),
}
VARIANTS = {
    "llama": "micro",
    "granite": "8b",
    "granite_moe_hybrid": "8b",
    "mistral": "7b",
    "qwen3": "0.6b",
    "gpt_bigcode": "micro",
}
UNFUSED = {"qwen3", "granite_moe_hybrid"}  # in their variants
# a fused Qwen3 lacks its norms there
MADE = [(name, fused) for name in CASES for fused in (True, False) if not (fused and name == "qwen3")]


def ask(cases: list[dict], directory: Path) -> None:
    """Have ibm-fms run some cases."""
    (directory / "cases.json").write_text(json.dumps(cases))
    command = [os.environ["FMS_PEER_PYTHON"], Path(__file__).with_name("run_ibm_fms.py"), directory / "cases.json"]
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    run = subprocess.run(command, cwd=directory, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def case_of(name: str, fused: bool, read: bool, directory: Path) -> dict:
    architecture, ours, theirs = CASES[name]
    stem = f"{name.replace(', ', '-')}-{fused}"
    return {
        "architecture": architecture,
        "variant": VARIANTS[architecture],
        "config": THEIRS | ours | theirs | {"fused_weights": fused},
        "weights": str(directory / stem / "model.pth") if not read else str(directory / stem),
        "read": read,
        "out": str(directory / f"{stem}.pt"),
    }


def compare(model: Decoder, theirs: dict, what: str) -> None:
    with torch.no_grad():
        logits = model.eval()(theirs["ids"])
    scale = float(theirs["logits"].std())
    difference = float((logits - theirs["logits"]).abs().max())
    print(f"{what}: largest difference {difference:.1e}, logits of standard deviation {scale:.2f}")
    assert 0.5 < scale < 5
    assert difference < 1e-5
    assert torch.equal(generate(model, theirs["ids"], max_new_tokens=24, do_sample=False), theirs["tokens"])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each case's random weights by ibm-fms, fused and not, and what it makes of them."""
    directory = tmp_path_factory.mktemp("made")
    cases = [case_of(name, fused, False, directory) for name, fused in MADE]
    for case in cases:
        Path(case["weights"]).parent.mkdir()
    ask(cases, directory)
    return directory


@pytest.fixture(scope="module")
def read(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each case's weights as we write them for it, and what it makes of them."""
    directory = tmp_path_factory.mktemp("read")
    for name in CASES:
        save_model(loaded(name, False, made), case_of(name, written_fused(name), True, directory)["weights"], "fms")
    ask([case_of(name, written_fused(name), True, directory) for name in CASES], directory)
    return directory


def written_fused(name: str) -> bool:
    return CASES[name][0] not in UNFUSED


def loaded(name: str, fused: bool, made: Path) -> Decoder:
    case = case_of(name, fused, False, made)
    architecture, ours, _ = CASES[name]
    return get_model(architecture, VARIANTS[architecture], case["weights"], source="fms", **OURS | ours)


@pytest.mark.parametrize(("name", "fused"), MADE)
def test_what_it_saves_is_read_here(made, name, fused):
    theirs = torch.load(case_of(name, fused, False, made)["out"])
    model = loaded(name, fused, made)
    compare(model, theirs, f"{name}, {'fused' if fused else 'unfused'}")
    compare(freeze(model), theirs, f"{name}, {'fused' if fused else 'unfused'}, frozen here")


@pytest.mark.parametrize("name", CASES)
def test_what_we_write_is_read_there(made, read, name):
    theirs = torch.load(case_of(name, written_fused(name), True, read)["out"])
    compare(loaded(name, False, made), theirs, f"{name}, written by us")
