"""Random weights to begin with."""

import torch
from torch import nn


@torch.no_grad()
def reset_parameters(model: nn.Module) -> None:
    """Normal of standard deviation 0.02, norms one, biases zero."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        elif isinstance(module, nn.RMSNorm | nn.LayerNorm):
            nn.init.ones_(module.weight)
        if (bias := getattr(module, "bias", None)) is not None:
            nn.init.zeros_(bias)
