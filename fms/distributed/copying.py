"""FSDP's collectives as copies between the GPUs of one machine, done by engines beside the multiprocessors.

Each rank reads its part of the others' memory, which all address (PyTorch's symmetric memory): a barrier before says
that all is written, one after that all is read. They wait for a rank as long as the group does, then fail.
"""

import gc
import logging
import math
import os
import socket
from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_api import AllGather, ReduceScatter

from fms.distributed.communicator import SWITCH, all_gather, reduce_scatter
from fms.distributed.symmetric import agreed, of_all
from fms.kernels.sum_parts import sum_parts

log = logging.getLogger(__name__)


class Block:
    """Memory of this rank, and by the handle what the others have in its place. The barrier is its own, as blocks are
    in use on several streams at a time, each on one."""

    def __init__(self, memory: Tensor, handle: Any, wait: int = 0):
        self.memory, self.handle, self.wait = memory, handle, wait
        self.stream: int | None = None  # none: any
        self._storage = memory.untyped_storage()
        self._alone = self._holders()

    def _holders(self) -> int:
        return torch._C._storage_Use_Count(self._storage._cdata)

    def free(self) -> bool:
        return self._holders() == self._alone

    def of(self, rank: int, like: Tensor) -> Tensor:
        """What another rank has where `like` begins this one's."""
        return self.handle.get_remote_tensor(rank, like.shape, like.dtype)

    def barrier(self) -> None:
        self.handle.barrier(timeout_ms=self.wait)


class Pool:
    """Blocks for one model's collectives. One that nobody holds any more is handed out again on the stream that had it.

    Ranks come together to make a block, so all must choose alike. They do: only FSDP holds blocks, and it lets go of
    them in its hooks, in the order of the program, once that stream waits for all that used them. Garbage, which each
    rank collects at another time, is of other models, and each has a pool of its own.
    """

    def __init__(self, make: Callable[[int], Block], stream: Callable[[], int]):
        self.make, self.stream = make, stream
        self.blocks: dict[int, Block] = {}  # by address
        self.users: WeakSet[Any] = WeakSet()

    def take(self, numel: int, dtype: torch.dtype) -> Tensor:
        nbytes, stream = numel * dtype.itemsize, self.stream()
        fit = [b for b in self.blocks.values() if nbytes <= b.memory.nbytes <= 2 * nbytes and b.free()]
        fit = [block for block in fit if block.stream in (None, stream)]
        block = min(fit, key=lambda b: b.memory.nbytes) if fit else self.make(nbytes)
        self.blocks[block.memory.data_ptr()] = block
        block.stream = stream
        return block.memory[:nbytes].view(dtype)

    def idle(self) -> bool:
        return not self.users and all(block.free() for block in self.blocks.values())


class _Copies:
    def __init__(self, pool: Pool, group: dist.ProcessGroup):
        self.pool, self.name, self.rank, self.size = pool, group.group_name, group.rank(), group.size()
        self.others = [(self.rank + i) % self.size for i in range(1, self.size)]  # not all read from one at a time
        pool.users.add(self)

    def block(self, x: Tensor, group: dist.ProcessGroup) -> Block | None:
        return self.pool.blocks.get(x.data_ptr()) if group.group_name == self.name else None


class Gather(_Copies, AllGather):
    def allocate(self, size: Sequence[Any], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return self.pool.take(math.prod(size), dtype)

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: Any, async_op: bool = False) -> Any:
        """The input is this rank's part of the output already."""
        if (block := self.block(output_tensor, group)) is None:
            return all_gather(output_tensor, input_tensor, group=group, async_op=async_op)
        shards = output_tensor.view(self.size, -1)
        block.barrier()
        for rank in self.others:
            shards[rank].copy_(block.of(rank, shards)[rank], non_blocking=True)
        block.barrier()


class Scatter(_Copies, ReduceScatter):
    """Parts come in the type that they were `computed` in, and are summed in the order of the ranks, in fp32 and into
    the type that is asked for: the same bits as sums of parts that were made as wide before, of which twice as many go
    from GPU to GPU. Only parts that were added up in that type before, without being sent, are rounded to come."""

    asked = 0  # elements of an input whose output is asked for next

    def __init__(self, pool: Pool, group: dist.ProcessGroup, computed: torch.dtype | None = None):
        super().__init__(pool, group)
        self.computed = computed

    def allocate(self, size: Sequence[Any], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        numel = math.prod(size)
        if numel * self.size == self.asked:  # which gradients keep
            self.asked = 0
            return torch.empty(numel, dtype=dtype, device=device)
        self.asked = numel
        return self.pool.take(numel, self.computed or dtype)

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: Any, op: Any, async_op: bool = False) -> Any:
        block = self.block(input_tensor, group)
        mean = op == dist.ReduceOp.AVG  # which may be of another class, and says so on the left only
        if block is None or not (mean or op == dist.ReduceOp.SUM):
            parts = input_tensor.to(output_tensor.dtype)
            return reduce_scatter(output_tensor, parts, op=op, group=group, async_op=async_op)
        ours = input_tensor.view(self.size, -1)
        theirs = torch.empty_like(ours[1:])
        block.barrier()
        for rank in self.others:
            theirs[rank - (rank > self.rank)].copy_(block.of(rank, ours)[self.rank], non_blocking=True)
        block.barrier()
        sum_parts(ours[self.rank], theirs, self.rank, output_tensor, 1 / self.size if mean else 1.0)


def pool_for(group: dist.ProcessGroup, device_type: str) -> tuple[Pool | None, str]:
    """What the ranks of a group may gather and scatter by copies with, or none and why. The log tells.

    All ranks of the group call this, and come to the same.
    """
    backend = group._get_backend(torch.device(device_type)).name()
    if group.size() == 1:
        return None, "one rank has all by itself"
    pool, why = None, ""
    if device_type != "cuda":
        why = f"copies are between GPUs, not on {device_type}"
    elif backend == os.environ.get(SWITCH):
        why = f"{SWITCH}={backend}"
    else:
        pool, why = _pool(group)
    if group.rank() == 0:
        told = f"{backend} ({why})" if pool is None else "copies between GPUs"
        log.info("%d ranks gather and scatter by %s", group.size(), told)
    return pool, why


def install(root: nn.Module, pool: Pool, group: dist.ProcessGroup, computed: torch.dtype | None = None) -> None:
    """Let all that FSDP shards under `root` gather and scatter by copies, gradients as they were `computed`."""
    gather, scatter = Gather(pool, group), Scatter(pool, group, computed)
    for module in root.modules():
        if isinstance(module, FSDPModule):
            module.set_custom_all_gather(gather)
            module.set_custom_reduce_scatter(scatter)


# The pools of a group, for as long as it lives, or why it has none. Ranks must free such memory in one order, but
# models end when Python's garbage is collected: so it is kept, for the next model.
_known: WeakKeyDictionary[dist.ProcessGroup, tuple[list[Pool], str]] = WeakKeyDictionary()


def _pool(group: dist.ProcessGroup) -> tuple[Pool | None, str]:
    """A pool whose model has ended on all ranks, or a new one; or why there can be none."""
    device = torch.device("cuda", torch.cuda.current_device())
    if group not in _known:
        _known[group] = _tried(group, device)
    pools, why = _known[group]
    if why:
        return None, why
    gc.collect()
    torch.cuda.synchronize(device)  # whatever stream used the memory
    everyone = of_all(group, [pool.idle() for pool in pools])
    pool = next((pool for pool, *idle in zip(pools, *everyone, strict=True) if all(idle)), None)
    if pool is None:
        pools.append(pool := Pool(_maker(group, device), _stream))
    for block in pool.blocks.values():
        block.stream = None
    return pool, ""


def _tried(group: dist.ProcessGroup, device: torch.device) -> tuple[list[Pool], str]:
    if len(set(of_all(group, socket.gethostname()))) > 1:
        return [], "copies are within one machine"
    pool = Pool(_maker(group, device), _stream)
    try:
        why = _check(pool, group, device)
    except (RuntimeError, ValueError) as error:
        why = f"copies: {error}"
    why = agreed(group, why)
    return [] if why else [pool], why


def _check(pool: Pool, group: dist.ProcessGroup, device: torch.device) -> str:
    """What is wrong with small whole numbers, if anything. All ranks do all of it."""
    wrong, rank, size = "", group.rank(), group.size()
    gather, scatter, ranks = Gather(pool, group), Scatter(pool, group), torch.arange(size, device=device)[:, None]
    for dtype, n in ((torch.float32, 100_003), (torch.bfloat16, 200_005)):
        whole = gather.allocate((size * n,), dtype=dtype, device=device)
        shards, total = whole.view(size, n), torch.empty(n, dtype=dtype, device=device)
        shards.fill_(-1)
        shards[rank] = rank
        gather(whole, shards[rank], group)
        if not (shards == ranks).all():
            wrong = f"copies: {dtype} gathered wrongly"
        shards.copy_((ranks + rank) % 3)
        scatter(total, whole, group, dist.ReduceOp.SUM)
        if not (total == ((ranks + rank) % 3).sum()).all():
            wrong = f"copies: a wrong sum of {dtype}"
        del whole, shards
    return wrong


def _stream() -> int:
    return torch.cuda.current_stream().cuda_stream


def _maker(group: dist.ProcessGroup, device: torch.device) -> Callable[[int], Block]:
    """What makes a block, on all ranks at a time. It does not keep the group alive, which keeps it."""
    name, backend = group.group_name, group._get_backend(device)
    wait = int(backend.options._timeout.total_seconds() * 1000)

    def make(nbytes: int) -> Block:
        import torch.distributed._symmetric_memory as symmetric_memory

        with torch.inference_mode(False):  # it could not be written to outside of it
            try:
                memory = symmetric_memory.empty(nbytes, dtype=torch.uint8, device=device)
            except RuntimeError:  # PyTorch's allocator may hold what it does not use
                torch.cuda.empty_cache()
                try:
                    memory = symmetric_memory.empty(nbytes, dtype=torch.uint8, device=device)
                except RuntimeError as error:
                    remedy = f"{nbytes / 1e9:.2f} GB for copies of FSDP's, which {SWITCH}={backend.name()} does without"
                    raise RuntimeError(f"{error}: {remedy}".replace("\n", " ")) from error
        torch.cuda.synchronize(device)  # the barrier's flags are zero before another rank sets one
        return Block(memory, symmetric_memory.rendezvous(memory, name), wait)

    return make
