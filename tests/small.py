"""A small random model in memory, whose attention is sharp enough that any mistake in it moves the logits."""

from typing import Any

import torch

from fms.models import Decoder, get_model

SHAPE: dict[str, Any] = {
    "nlayers": 2,
    "src_vocab_size": 24,
    "emb_dim": 16,
    "nheads": 4,
    "kvheads": 2,
    "head_dim": 8,
    "hidden_dim": 24,
    "max_expected_seq_len": 48,
    "rope_theta": 20.0,
}
MULTIPLIERS: dict[str, Any] = {  # of Granite, in a size that suits random weights
    "embedding_multiplier": 2.0,
    "attention_multiplier": 0.4,
    "residual_multiplier": 0.8,
    "logits_scaling": 0.5,
}


def small_model(architecture: str = "llama", variant: str = "micro", *, seed: int = 0, **fields: Any) -> Decoder:
    """Weights and biases of standard deviation 0.3, norms of 0.3 around one."""
    torch.manual_seed(seed)
    shape = {name: size for name, size in SHAPE.items() if (architecture, name) != ("gpt_bigcode", "rope_theta")}
    model = get_model(architecture, variant, **(shape | fields))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_norm = name.endswith(("ln.weight", "norm.weight"))
            parameter.normal_(1.0 if is_norm else 0.0, 0.3)
    return model.eval()


def small_granite(**fields: Any) -> Decoder:
    return small_model("granite", "8b", **(MULTIPLIERS | fields))
