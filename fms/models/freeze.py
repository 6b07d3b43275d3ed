"""The inference form of a model."""

from typing import Any

import torch
from torch import nn

from fms.models.compile import compile_model
from fms.modules.block import Block, EncoderBlock
from fms.modules.frozen import Frozen, FrozenBlock, FrozenEncoderBlock


def freeze(model: Any) -> Any:
    """Replace each block by its frozen form, in place, and turn gradients and dropout off. Returns the model.

    Parameters and `state_dict()` keep their names. Freezing twice does nothing more.
    """
    for i, block in enumerate(model.layers):
        if isinstance(block, Block):
            model.layers[i] = FrozenBlock(block)
        elif isinstance(block, EncoderBlock):
            model.layers[i] = FrozenEncoderBlock(block)
        if model.embedding.weight.is_cuda:
            torch.cuda.empty_cache()  # the parts are too small to make the next whole of: memory would grow by half
    model.tie_weights()
    if (mode := getattr(model, "compiled", "none")) != "none":
        compile_model(model, mode)  # the new blocks as the old ones were
    return model.requires_grad_(False).eval()


def is_frozen(model: nn.Module) -> bool:
    return any(isinstance(module, Frozen) for module in model.modules())
