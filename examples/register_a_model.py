"""A model of your own for `get_model`, and weights in a format of your own: python examples/register_a_model.py"""

import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

from fms.models import freeze, get_model, register_model
from fms.models.llama import HF, LLaMA, LLaMAConfig
from fms.utils.generation import generate
from fms.utils.serialization.sources import register_source

# An architecture is a name, variants are rows; what builds one takes overrides of the configuration.
SMALL = LLaMAConfig(
    src_vocab_size=256,
    emb_dim=64,
    nheads=4,
    kvheads=2,
    head_dim=16,
    nlayers=2,
    hidden_dim=128,
    max_expected_seq_len=128,
)
register_model("lynx", "small", lambda **overrides: LLaMA(SMALL, **overrides))

# A format is a table of their names and ours, `*` for a layer's number: here theirs only have "net." before ours.
register_source("lynx", "net", [(f"net.{ours}", ours) for _, ours, *_ in HF if ours])

model = get_model("lynx", "small")
with tempfile.TemporaryDirectory() as directory:
    file = Path(directory) / "weights.safetensors"
    save_file({f"net.{name}": tensor for name, tensor in model.state_dict().items()}, file)
    again = get_model("lynx", "small", file, source="net")
assert all(torch.equal(new, old) for new, old in zip(again.parameters(), model.parameters(), strict=True))
print(generate(freeze(again), torch.tensor([[1, 2, 3]]), max_new_tokens=8).tolist())
