"""Grouped-query attention."""

from typing import Any

from torch import Tensor, nn

from fms.kernels.attend import Angles, LayerCache, Norms, attend
from fms.modules.tp import Communicator, Plan, divided, pad_inputs, pad_outputs, rounded


class Attention(nn.Module):
    """Attention whose query heads share key and value heads in groups (Ainslie et al. 2023, arXiv 2305.13245).

    `kvheads` of `nheads` is multi-head attention, 1 is multi-query. `scale` multiplies the scores, 1 / sqrt(head_dim)
    where it is `None`; `dropout` is that of the weights, in training only. `q_norm` and `k_norm` act on each head.
    """

    comm: Communicator | None = None  # of the ranks that have the other heads

    def __init__(
        self,
        emb_dim: int,
        nheads: int,
        kvheads: int,
        head_dim: int,
        bias: bool = False,
        scale: float | None = None,
        dropout: float = 0.0,
        *,
        causal: bool = True,
        q_norm: nn.Module | None = None,
        k_norm: nn.Module | None = None,
    ):
        super().__init__()
        self.kvheads, self.head_dim, self.scale, self.dropout, self.causal = kvheads, head_dim, scale, dropout, causal
        self.query = nn.Linear(emb_dim, nheads * head_dim, bias=bias)
        self.key = nn.Linear(emb_dim, kvheads * head_dim, bias=bias)
        self.value = nn.Linear(emb_dim, kvheads * head_dim, bias=bias)
        self.dense = nn.Linear(nheads * head_dim, emb_dim, bias=bias)
        self.q_norm, self.k_norm = q_norm, k_norm

    @property
    def norms(self) -> Norms | None:
        return None if self.q_norm is None or self.k_norm is None else (self.q_norm, self.k_norm)

    def tp_plan(self, tp: int) -> Plan:
        """By heads. Where there are fewer key and value heads than ranks, each rank computes the one that it reads."""
        nheads, kvheads = self.query.out_features // self.head_dim, self.kvheads
        divided("query heads", nheads, tp)
        if kvheads % tp and tp % kvheads:
            raise ValueError(f"{kvheads} key and value heads can't be split over {tp} ranks, nor shared by them evenly")
        kv = "replicate" if kvheads % tp else "colwise"
        plan = {"": "enter", "query": "colwise", "key": kv, "value": kv, "dense": "rowwise"}
        return plan | ({"q_norm": "partial", "k_norm": "partial"} if self.norms else {})

    def pad(self, tp: int) -> str | None:
        """Add heads of zeros, which change nothing, until `tp` ranks can share them. Says what became of it."""
        heads, kvheads = self.query.out_features // self.head_dim, self.kvheads
        if heads % tp == 0 and (kvheads % tp == 0 or tp % kvheads == 0):
            return None
        self.kvheads = 1 if kvheads == 1 else rounded(kvheads, tp)
        padded = rounded(heads, tp) if kvheads == 1 else heads // kvheads * self.kvheads
        pad_outputs(self.query, size=padded * self.head_dim)
        pad_outputs(self.key, self.value, size=self.kvheads * self.head_dim)
        pad_inputs(self.dense, padded * self.head_dim)
        return f"{heads} query and {kvheads} key and value heads become {padded} and {self.kvheads}"

    def forward(self, x: Tensor, angles: Angles | None, mask: Tensor | None, layer: LayerCache | None) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (-1, self.head_dim)) for p in (self.query, self.key, self.value))  # b s h d
        dropout = self.dropout if self.training else 0.0
        how: dict[str, Any] = {"causal": self.causal, "norms": self.norms, "dropout": dropout}
        if not dropout or self.comm is None:
            return self.dense(attend(q, k, v, angles, mask, layer, self.scale, **how))
        with self.comm.apart(x.device):  # heads of other ranks drop others
            out = attend(q, k, v, angles, mask, layer, self.scale, **how)
        return self.dense(out)
