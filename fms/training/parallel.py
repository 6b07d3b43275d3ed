"""A run's ranks: which share a model, which its data, and how a model becomes theirs."""

import contextlib
import logging
import os
from collections.abc import Iterator
from functools import partial
from types import MethodType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import register_fsdp_forward_method
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from fms.distributed.fsdp import shard
from fms.distributed.mesh import make_mesh
from fms.training.config import TrainConfig
from fms.training.ranks import world

log = logging.getLogger(__name__)


def mesh_for(config: TrainConfig, device: torch.device) -> DeviceMesh | None:
    """The mesh of the strategy's axes; none for one process. Raises `ValueError` if the ranks do not make it."""
    size, kind = world(), config.distributed
    if size == 1 and kind != "none" and "RANK" in os.environ:
        log.warning("torchrun started one process: there is nothing to share out, distributed=%r has no effect", kind)
        return None
    if not dist.is_initialized() or kind == "none":
        if size > 1 or kind != "none":
            raise ValueError(f"distributed={kind!r} on {size} process{'es' * (size > 1)}: {_remedy(kind)}")
        return None
    tp = (config.tp or (size if kind == "tp" else 2)) if "tp" in kind else 1
    replicate = {"ddp": size, "hsdp": config.replicate}.get(kind, 1)
    if kind == "tp" and tp != size:
        raise ValueError(f"distributed='tp' splits a model over all {size} processes, not tp={tp}: tp+fsdp does both")
    return make_mesh(device.type, tp=tp, replicate=replicate)


def _remedy(kind: str) -> str:
    return "start with torchrun --nproc_per_node=N" if kind != "none" else "say which, as --distributed fsdp"


def share_out(root: Any, config: TrainConfig, mesh: DeviceMesh | None) -> Any:
    """FSDP2 over the mesh's data axes; nothing where all ranks see the same data. Returns the root."""
    if mesh is None or mesh["replicate"].size() * mesh["shard"].size() == 1:
        return root
    # which would tell each run that norms are summed over two axes in turn
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
    low = torch.bfloat16 if config.mixed_precision == "bf16" else None
    shard(root, mesh, reshard=config.zero == 3, param_dtype=low, reduce_dtype=torch.float32 if low else None)
    register_fsdp_forward_method(root, "next_logits")
    return root


def recompute(model: Any, mode: str) -> None:
    """Let each block forget what it computed, all of it or ("selective") all but products and attention, and compute
    it again in the backward."""
    if mode == "none":
        return
    forward = _forgetting if mode == "full" else _forgetting_some
    for block in model.layers:
        block.forward = MethodType(forward, block)  # one function for all: compiled once for all


def _forgetting(block: Any, *args: Any, **kwargs: Any) -> Any:
    return checkpoint(type(block).forward, block, *args, use_reentrant=False, **kwargs)


def _forgetting_some(block: Any, *args: Any, **kwargs: Any) -> Any:
    keep = partial(create_selective_checkpoint_contexts, _policy)
    return checkpoint(type(block).forward, block, *args, use_reentrant=False, context_fn=keep, **kwargs)


_aten = torch.ops.aten
KEPT = {
    _aten.mm.default,
    _aten.addmm.default,
    _aten.bmm.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
}


def _policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in KEPT else CheckpointPolicy.PREFER_RECOMPUTE


@contextlib.contextmanager
def attention_kernels(device: torch.device) -> Iterator[None]:
    """On a GPU cuDNN's attention where it fits: it plans anew for each shape, of which a training has few."""
    if device.type != "cuda":
        yield
        return
    from torch.nn.attention import SDPBackend as Kind
    from torch.nn.attention import sdpa_kernel

    order = [Kind.CUDNN_ATTENTION, Kind.FLASH_ATTENTION, Kind.EFFICIENT_ATTENTION, Kind.MATH]
    with sdpa_kernel(order, set_priority=True):
        yield


def last_of_step(root: Any, last: bool) -> None:
    """Replicas add up gradients only after the last forward of a step."""
    if hasattr(root, "set_requires_all_reduce"):
        root.set_requires_all_reduce(last)
        root.set_is_last_backward(last)


def whole(model: nn.Module, keep: bool) -> None:
    """Make every parameter that is shared out over ranks an ordinary one again, on the CPU: where `keep`, empty
    elsewhere. All ranks call it, at the end: the model can't be trained after."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, p in list(module._parameters.items()):
            if p is None:
                continue
            if id(p) not in made:
                full: Tensor = p.detach().full_tensor() if hasattr(p, "full_tensor") else p.detach()  # type: ignore
                made[id(p)] = nn.Parameter(full.cpu() if keep else full.new_empty(0), requires_grad=False)
            module._parameters[name] = made[id(p)]
