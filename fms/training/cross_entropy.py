"""Cross-entropy straight from hidden states: the logits of a batch are never there all at once."""

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from fms.kernels.cross_entropy import slope_, tally
from fms.training.loss import IGNORED

ELEMENTS = 1 << 27  # of the logits that are there at one time on a CPU: half a gigabyte in fp32
ON_GPU = 1 << 30  # and on a GPU: two in bf16, which keep its products large


def head_loss(h: Tensor, head: Any, labels: Tensor, elements: int | None = None) -> Tensor:
    """The sum, in fp32 at least, of the cross-entropy of `head(h)` against the labels (b, s) that are not `IGNORED`.

    h (b, s, emb_dim) are a model's states, `head` its projection to the vocabulary, which may be this rank's share of
    it: then ranks exchange a maximum and two sums for each token. Gradients are computed with the loss, so that logits
    are made once; of a share twice. A head that is no plain projection (LoRA) makes all its logits.
    """
    if not is_projection(head):
        logits = head(h).flatten(0, 1)
        return F.cross_entropy(logits.float(), labels.flatten(), ignore_index=IGNORED, reduction="sum")
    elements = elements or (ON_GPU if h.is_cuda else ELEMENTS)
    comm = head.comm if getattr(head, "shards", None) else None
    h = h if comm is None else comm.same(h)
    return _HeadLoss.apply(h.flatten(0, 1), head.weight, head.bias, labels.flatten(), head, elements)


def is_projection(head: Any) -> bool:
    """Whether it is one matrix; LoRA's is not."""
    return hasattr(head, "scaling") and not hasattr(head, "base_layer")


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, h: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, head: Any, elements: int
    ) -> Tensor:
        dtypes = h.dtype, weight.dtype, None if bias is None else bias.dtype
        if torch.is_autocast_enabled(h.device.type):
            dtype = torch.get_autocast_dtype(h.device.type)
            h, weight, bias = h.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
        wide = torch.promote_types(h.dtype, torch.float32)
        comm = head.comm if getattr(head, "shards", None) else None
        first = 0 if comm is None else head.shards["weight"][0].start
        chunks = -(-len(h) // max(1, elements // max(len(weight), 1)))
        rows = -(-len(h) // max(chunks, 1)) or 1
        counted = labels != IGNORED
        here = (labels >= first) & (labels < first + len(weight)) & counted
        local = (labels - first).masked_fill(~here, -1)
        factor = 1 / head.scaling
        parts = [slice(start, min(start + rows, len(h))) for start in range(0, len(h), rows)]

        def logits(part: slice) -> Tensor:
            return F.linear(h[part], weight, bias)

        only = logits(parts[0]) if comm is not None and len(parts) == 1 else None  # kept: they are no more than a chunk
        found = None
        if comm is not None:
            given = ((p, logits(p) if only is None else only) for p in parts)
            found = _over_ranks((tally(scores, local[p], factor) for p, scores in given), comm)
        need_h, need_weight, need_bias = ctx.needs_input_grad[:3]
        dh = torch.empty_like(h) if need_h else None
        dweight = torch.zeros_like(weight, dtype=wide) if need_weight else None
        dbias = torch.zeros_like(bias, dtype=wide) if bias is not None and need_bias else None
        total = h.new_zeros((), dtype=wide)
        for part in parts:
            scores = only
            if found is None:
                scores = logits(part)
                top, sums, right = tally(scores, local[part], factor)
                log_sum = sums.log() + top
            else:
                log_sum, right = (values[part] for values in found)
            total += (log_sum - right).masked_fill(~counted[part], 0).sum()
            if not (need_h or need_weight or need_bias):
                continue
            log_sum = log_sum.masked_fill(~counted[part], torch.inf)
            slope = slope_(logits(part) if scores is None else scores, local[part], log_sum, factor)
            if dbias is not None:
                dbias += slope.sum(0, dtype=wide)
            if dh is not None:
                torch.mm(slope, weight, out=dh[part])
            if dweight is not None:
                _add_product(dweight, slope.t(), h[part])
        ctx.save_for_backward(dh, dweight, dbias)
        ctx.dtypes = dtypes
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        found = [
            None if d is None else torch.mul(d, gradient, out=torch.empty_like(d, dtype=dtype))  # in one pass
            for d, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return (*found, None, None, None)


def _add_product(to: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a @ b to what is wider: on a GPU without rounding the product first."""
    if to.is_cuda and to.dtype != a.dtype:
        torch.addmm(to, a, b, out_dtype=to.dtype, out=to)
    else:
        to += a @ b


def _over_ranks(shares: Iterable[tuple[Tensor, Tensor, Tensor]], comm: Any) -> tuple[Tensor, Tensor]:
    """For each token the log of the sum over the whole vocabulary, and the logit of its label: one maximum over the
    ranks, and one sum of two numbers."""
    mine, sums, rights = (torch.cat(values) for values in zip(*shares, strict=True))
    top = mine.clone()
    dist.all_reduce(top, dist.ReduceOp.MAX, group=comm.group)
    packed = comm.sum(torch.stack((sums * (mine - top).exp(), rights)))
    return packed[0].log() + top, packed[1]
