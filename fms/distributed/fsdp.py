"""Parameters, gradients and optimizer states shared out over the ranks that see different data."""

from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from fms.distributed.copying import install, pool_for


def shard(
    root: Any,
    mesh: DeviceMesh,
    *,
    reshard: bool = True,
    param_dtype: torch.dtype | None = None,
    reduce_dtype: torch.dtype | None = None,
) -> Any:
    """FSDP2 over the data axes of a mesh of `make_mesh`: each block of the model gathers its parameters when it runs.

    `root`, which is called, holds the model; what is in no block (embedding, last norm, a tied pair, an encoder's head)
    belongs to it. A decoder's own head is gathered when it is called, and its gradient is on its way while blocks
    compute theirs. Where "replicate" has several ranks each replica is sharded by itself (HSDP). `reshard=False` keeps
    parameters gathered between forward and backward (ZeRO-2). `param_dtype` is what is computed in, `reduce_dtype` what
    gradients are summed in. The model may be tensor parallel along "tp" already. GPUs of one machine gather and scatter
    by copies where they can. Returns the root.
    """
    data = mesh["replicate", "shard"] if mesh["replicate"].size() > 1 else mesh["shard"]
    group = mesh["shard"].get_group()
    pool, _ = pool_for(group, mesh.device_type)
    # the angles of positions go into each block and stay fp32
    precision = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=reduce_dtype, cast_forward_inputs=False)
    model = next(module for module in root.modules() if isinstance(getattr(module, "layers", None), nn.ModuleList))
    for block in model.layers:
        again = reshard and block is not model.layers[-1]  # whose backward comes next
        fully_shard(block, mesh=data, reshard_after_forward=again, mp_policy=precision)
    head = model.head
    own = head._parameters.get("weight") if hasattr(head, "scaling") else None  # LoRA's has none
    if own is not None and own is not model.embedding._parameters.get("weight"):
        fully_shard(head, mesh=data, reshard_after_forward=False, mp_policy=precision)
    fully_shard(root, mesh=data, reshard_after_forward=reshard, mp_policy=precision)
    if pool is not None:
        install(root, pool, group, param_dtype)
    root.register_forward_hook(lambda root, given, made: None if torch.is_grad_enabled() else at_rest(root))
    return root


def at_rest(root: nn.Module) -> None:
    """Share out again what is kept gathered for a backward that does not come: only shards are trained and saved."""
    for module in root.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
