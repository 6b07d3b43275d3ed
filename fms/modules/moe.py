"""Mixtures of experts: a router sends each token to a few of many feed-forward layers."""

import torch
from torch import Tensor, nn

from fms.kernels.experts import experts
from fms.kernels.grouped_linear import grouped_linear
from fms.modules.feedforward import ACTIVATIONS, GatedLinearUnit
from fms.modules.tp import Plan, divided, pad, resharded, rounded


class Experts(nn.Module):
    """Gated linear units side by side, each weight a parameter (experts, out, in)."""

    def __init__(self, emb_dim: int, hidden_dim: int, num_experts: int, activation: str = "silu"):
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        self.wg = nn.Parameter(torch.empty(num_experts, hidden_dim, emb_dim).normal_(std=0.02))
        self.w1 = nn.Parameter(torch.empty(num_experts, hidden_dim, emb_dim).normal_(std=0.02))
        self.w2 = nn.Parameter(torch.empty(num_experts, emb_dim, hidden_dim).normal_(std=0.02))
        self.fused: Tensor | None = None  # wg and w1, (experts, 2 hidden_dim, emb_dim)

    def tp_plan(self, tp: int) -> Plan:
        divided("hidden channels of experts", self.w2.shape[2], tp)
        return {"": "experts"}

    def pad(self, tp: int) -> str | None:
        """Add channels of zeros, which change nothing, until `tp` ranks can share them. Says what became of them."""
        hidden = self.w2.shape[2]
        if hidden % tp == 0:
            return None
        for name, dim in (("wg", 1), ("w1", 1), ("w2", 2)):
            pad(self, name, dim, rounded(hidden, tp))
        return f"{hidden} hidden channels of experts become {self.w2.shape[2]}"

    def fuse(self) -> None:
        """For inference: one weight for wg and w1, which become views of it."""
        self.fused = torch.cat((self.wg.detach(), self.w1.detach()), 1)
        for name, view in zip(("wg", "w1"), self.fused.chunk(2, 1), strict=True):
            view = resharded(self._parameters[name], view)
            self.register_parameter(name, nn.Parameter(view, requires_grad=False))

    def forward(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        """Rows x (t, emb_dim), each through its k `chosen` experts (t, k), summed with `weights` (t, k)."""
        if self.fused is not None:
            y = experts(x, self.fused, self.w2, weights, chosen, self.activation)
            if y is not None:
                return y
        k = chosen.shape[1]
        expert, order = chosen.flatten().sort()
        ends = torch.searchsorted(expert, torch.arange(len(self.w2), device=x.device), right=True, out_int32=True)
        rows = x[order // k]  # t*k emb_dim, by expert
        if self.fused is None:
            gate, up = grouped_linear(rows, self.wg, ends), grouped_linear(rows, self.w1, ends)
        else:
            gate, up = grouped_linear(rows, self.fused, ends).chunk(2, -1)
        rows = grouped_linear(self.activation(gate) * up, self.w2, ends)
        rows = torch.empty_like(rows).index_copy(0, order, rows).unflatten(0, (-1, k))  # t k emb_dim
        return (rows * weights[..., None]).sum(1).type_as(x)


class MixtureOfExperts(nn.Module):
    """The weighted sum of the `top_k` experts that `gate` prefers for a token (Jiang et al. 2024, arXiv 2401.04088).

    The weights are a softmax, in fp32 at least, over the logits of the chosen ones: that over all experts, normalised.
    """

    def __init__(self, emb_dim: int, hidden_dim: int, num_experts: int, top_k: int, activation: str = "silu"):
        super().__init__()
        self.top_k = top_k
        self.gate = nn.Linear(emb_dim, num_experts, bias=False)
        self.experts = Experts(emb_dim, hidden_dim, num_experts, activation)

    def tp_plan(self, tp: int) -> Plan:
        return {"": "summed", "gate": "partial"}

    def fuse(self) -> None:
        self.experts.fuse()

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)
        logits = self.gate(rows)
        logits, chosen = logits.to(torch.promote_types(logits.dtype, torch.float32)).topk(self.top_k)
        return self.experts(rows, logits.softmax(-1), chosen).view_as(x)


class SharedExpert(GatedLinearUnit):
    """An expert that every token goes through, beside the `routed` ones."""

    def __init__(self, emb_dim: int, hidden_dim: int, routed: MixtureOfExperts, activation: str = "silu"):
        super().__init__(emb_dim, hidden_dim, activation)
        self.routed = routed

    def tp_plan(self, tp: int) -> Plan:
        return super().tp_plan(tp) | {"": "summed", "w2": "addend", "routed": "within"}

    def fuse(self) -> None:
        self.routed.fuse()

    def forward(self, x: Tensor) -> Tensor:
        return self.routed(x) + super().forward(x)
