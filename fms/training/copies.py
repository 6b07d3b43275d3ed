"""Mixed precision without FSDP: bf16 copies of fp32 parameters, as it makes them of what it gathers."""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn


class Copies:
    """What a root computes with in place of its parameters; gradients come to the copies. Changes of a parameter in
    place are seen, but for those of fused optimizers, of `p.data` and of a DTensor's shard: `changed` tells of them."""

    def __init__(self, root: nn.Module):
        self.places = [
            (m._parameters, name, p)
            for m in root.modules()
            for name, p in m._parameters.items()
            if p is not None and p.dtype != torch.bfloat16
        ]
        self.made: dict[nn.Parameter, nn.Parameter] = {}  # a tied one stays tied
        for _, _, p in self.places:
            if p not in self.made:
                self.made[p] = nn.Parameter(p.detach().to(torch.bfloat16), p.requires_grad)
        self.versions = {p: p._version for p in self.made}  # that copies were made of

    @contextlib.contextmanager
    def used(self) -> Iterator[None]:
        """Within, the copies stand where the parameters were."""
        for p, copy in self.made.items():
            if self.versions.get(p) != p._version:
                copy.detach().copy_(p.detach())
                self.versions[p] = p._version
        for parameters, name, p in self.places:
            parameters[name] = self.made[p]
        try:
            yield
        finally:
            for parameters, name, p in self.places:
                parameters[name] = p

    def changed(self) -> None:
        """Say that parameters were written: fused optimizers leave their versions as they are, and so does what is read
        into the shards of DTensors."""
        self.versions.clear()

    def add_up(self) -> None:
        """Move gradients to the parameters, in fp32."""
        for p, copy in self.made.items():
            if copy.grad is not None:
                p.grad = copy.grad.to(p.dtype) if p.grad is None else p.grad.add_(copy.grad)
                copy.grad = None
