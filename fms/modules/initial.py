"""Random weights to begin with."""

from typing import Any

import torch
from torch import Tensor, nn

from fms.modules.tp import shard_of, unpadded


@torch.no_grad()
def reset_parameters(model: nn.Module) -> None:
    """Normal of standard deviation 0.02, norms one, biases zero. A sharded model gets shards of the same weights."""
    module: Any
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            shard = getattr(parameter, "_local_tensor", parameter)
            shape = unpadded(module, name)
            whole = shard if shard.shape == shape else shard.new_empty(shape)
            _draw(module, name, whole)
            if whole is not shard:
                shard.copy_(shard_of(module, name, whole.__getitem__))


def _draw(module: nn.Module, name: str, parameter: Tensor) -> None:
    if name == "bias":
        nn.init.zeros_(parameter)
    elif isinstance(module, nn.RMSNorm | nn.LayerNorm):
        nn.init.ones_(parameter)
    else:
        nn.init.normal_(parameter, std=0.02)
