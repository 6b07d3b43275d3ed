"""Meshes: which ranks share a model's weights, and which its data."""

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import _set_pg_timeout

AXES = ("replicate", "shard", "tp")


def make_mesh(device_type: str, tp: int = 1, shard: int | None = None, replicate: int = 1) -> DeviceMesh:
    """All ranks on three axes. Along "tp" ranks share one model and see the same data, along "shard" they hold parts of
    one copy of the parameters (FSDP), along "replicate" a copy each; both see data of their own.

    `shard` defaults to what the other two leave. "tp" is the last axis: the neighbours of one machine. Ranks wait for
    each other as long as those of the whole group do. Raises `ValueError` if the sizes do not make the number of ranks.
    """
    world = dist.get_world_size()
    if shard is None:
        shard = max(world // (tp * replicate), 1)
    if tp * shard * replicate != world:
        raise ValueError(f"tp={tp} x shard={shard} x replicate={replicate} is not the {world} ranks that there are")
    mesh = init_device_mesh(device_type, (replicate, shard, tp), mesh_dim_names=AXES)
    assert dist.group.WORLD is not None
    patience = dist.group.WORLD._get_backend(torch.device(device_type)).options._timeout  # else PyTorch's: half an hour
    for axis in AXES:
        _set_pg_timeout(patience, mesh[axis].get_group())
    return mesh


def data_place(mesh: DeviceMesh | None) -> tuple[int, int]:
    """Of this rank among those that see different data: its number, and how many there are."""
    if mesh is None:
        return 0, 1
    replicate, shard = mesh.get_local_rank("replicate"), mesh.get_local_rank("shard")
    size = mesh["shard"].size()
    return replicate * size + shard, mesh["replicate"].size() * size
