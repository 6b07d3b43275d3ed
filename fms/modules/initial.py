"""Random weights to begin with."""

import torch
from torch import nn


@torch.no_grad()
def reset_parameters(model: nn.Module) -> None:
    """Normal of standard deviation 0.02, norms one, biases zero."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if name == "bias":
                nn.init.zeros_(parameter)
            elif isinstance(module, nn.RMSNorm | nn.LayerNorm):
                nn.init.ones_(parameter)
            else:
                nn.init.normal_(parameter, std=0.02)
