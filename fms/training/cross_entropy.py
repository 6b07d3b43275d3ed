"""Cross-entropy straight from hidden states: the logits of a batch are never there all at once."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from fms.training.loss import IGNORED

ELEMENTS = 1 << 27  # of the logits that are there at one time: half a gigabyte in fp32


def head_loss(h: Tensor, head: Any, labels: Tensor, elements: int = ELEMENTS) -> Tensor:
    """The sum, in fp32 at least, of the cross-entropy of `head(h)` against the labels (b, s) that are not `IGNORED`.

    h (b, s, emb_dim) are a model's states, `head` its projection to the vocabulary, which may be this rank's share of
    it: then ranks exchange a maximum and two sums for each token. Gradients are computed with the loss, so that logits
    are made once; of a share twice. A head that is no plain projection (LoRA) makes all its logits.
    """
    if not hasattr(head, "scaling") or hasattr(head, "base_layer"):
        logits = head(h).flatten(0, 1)
        return F.cross_entropy(logits.float(), labels.flatten(), ignore_index=IGNORED, reduction="sum")
    comm = getattr(head, "comm", None)
    h = h if comm is None else comm.same(h)
    return _HeadLoss.apply(h.flatten(0, 1), head.weight, head.bias, labels.flatten(), head, elements)


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, h: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, head: Any, elements: int
    ) -> Tensor:
        if torch.is_autocast_enabled(h.device.type):
            dtype = torch.get_autocast_dtype(h.device.type)
            h, weight, bias = h.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
        wide = torch.promote_types(h.dtype, torch.float32)
        comm = getattr(head, "comm", None)
        first = 0 if comm is None else head.shards["weight"][0].start
        rows = max(1, elements // max(len(weight), 1))
        local = labels - first
        here = (local >= 0) & (local < len(weight)) & (labels != IGNORED)
        local = local.masked_fill(~here, 0)

        def logits(part: slice) -> Tensor:
            return F.linear(h[part], weight, bias).to(wide) / head.scaling

        def target(scores: Tensor, part: slice) -> Tensor:
            if not len(weight):  # more ranks than rows
                return scores.new_zeros(len(scores))
            return scores.gather(1, local[part, None])[:, 0].masked_fill(~here[part], 0)

        parts = [slice(start, min(start + rows, len(h))) for start in range(0, len(h), rows)]
        found = None if comm is None else _over_ranks(logits, target, parts, comm)
        counted = labels != IGNORED
        need_h, need_weight, need_bias = ctx.needs_input_grad[:3]
        dh = torch.empty_like(h) if need_h else None
        dweight = torch.zeros_like(weight, dtype=wide) if need_weight else None
        dbias = torch.zeros_like(bias, dtype=wide) if bias is not None and need_bias else None
        total = h.new_zeros((), dtype=wide)
        for part in parts:
            if found is None:
                scores = logits(part)
                log_sum, right = scores.logsumexp(1), target(scores, part)
            else:
                log_sum, right = (values[part] for values in found)
            total += (log_sum - right).masked_fill(~counted[part], 0).sum()
            if not (need_h or need_weight or need_bias):
                continue
            if found is not None:
                scores = logits(part)
            slope = scores.sub_(log_sum[:, None]).exp_()  # the softmax, then its difference from the label
            if len(weight):
                slope.scatter_add_(1, local[part, None], -here[part, None].to(wide))
            slope = slope.masked_fill_(~counted[part, None], 0).div_(head.scaling)
            if dbias is not None:
                dbias += slope.sum(0)
            slope = slope.to(h.dtype)
            if dh is not None:
                torch.mm(slope, weight, out=dh[part])
            if dweight is not None:
                dweight += slope.t() @ h[part]
        ctx.save_for_backward(dh, dweight, dbias)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return (*(None if d is None else d * gradient for d in ctx.saved_tensors), None, None, None)


def _over_ranks(
    logits: Callable[[slice], Tensor], target: Callable[[Tensor, slice], Tensor], parts: list[slice], comm: Any
) -> tuple[Tensor, Tensor]:
    """For each token the log of the sum over the whole vocabulary, and the logit of its label: one maximum over the
    ranks, and one sum of two numbers."""
    largest, sums, rights = [], [], []
    for part in parts:
        scores = logits(part)
        top = scores.amax(1) if scores.shape[1] else scores.new_full((len(scores),), -torch.inf)
        largest.append(top)
        sums.append((scores - top[:, None]).exp().sum(1))
        rights.append(target(scores, part))
    mine = torch.cat(largest)
    top = mine.clone()
    dist.all_reduce(top, dist.ReduceOp.MAX, group=comm.group)
    packed = comm.sum(torch.stack((torch.cat(sums) * (mine - top).exp(), torch.cat(rights))))
    return packed[0].log() + top, packed[1]
