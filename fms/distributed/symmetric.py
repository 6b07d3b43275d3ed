"""Sums over the GPUs of one machine by memory that all of them address."""

import socket
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from fms.kernels import sum_add as ours
from fms.kernels.launching import machine
from fms.kernels.linear_sum import linear_sum, linear_sum_of, serves_linear_sum

DTYPES = (torch.bfloat16, torch.float32)  # the kernels know no other
ONE_SHOT = 256 << 10  # bytes up to which each rank reads all of every other; beyond, a share of each, then the sums
MOST = 8 << 20  # bytes beyond which copies in and out of the buffer cost what is won
ALIGNED = 16  # bytes


class SymmetricMemory:
    """PyTorch's symmetric memory (`torch.ops.symm_mem`). Ranks add in one order, so that all hold the same bits.

    The kernels begin and end with a barrier of all ranks: one buffer serves one sum after the other, in replays of a
    CUDA graph too. A rank that does not come keeps the others in the kernel: no timeout ends that.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device):
        self.name = group.group_name
        memory, _ = _shared(MOST, group, device)
        self.buffers = {dtype: memory.view(dtype) for dtype in DTYPES}
        self.peers: ours.Peers | None = None
        if machine(device) is not None:
            # kept here, as kernels know addresses only
            self.room, addresses = _shared(ours.room(dist.get_world_size(group)), group, device)
            self.peers = ours.make_peers(addresses, dist.get_rank(group), device)
            ours.peers_of[self.name] = self.peers

    def adds(self, x: Tensor) -> bool:
        """Whether our own kernel takes x, which alone can be compiled."""
        return self.peers is not None and ours.serves_sum(x)

    def takes(self, x: Tensor) -> bool:
        return self.adds(x) or (x.dtype in self.buffers and x.nbytes <= MOST and x.nbytes % ALIGNED == 0)

    def sum(self, x: Tensor, residual: Tensor | None = None, scale: float = 1.0, bias: Tensor | None = None) -> Tensor:
        """`residual + scale * (sum of all ranks' x + bias)`, or the sum alone; x, contiguous, may be overwritten."""
        if self.adds(x):
            assert self.peers is not None
            kind = x.dtype
            at_once = (residual is None or residual.dtype == kind) and (bias is None or bias.dtype == kind)
            more = (residual, scale, bias) if at_once else (None, 1.0, None)
            if torch.compiler.is_compiling():
                total = ours.sum_add_of(x, self.name, *more)
            else:
                total = ours.sum_add(x, self.peers, *more)
            if at_once or residual is None:
                return total
        else:
            inside = self.buffers[x.dtype][: x.numel()].view(x.shape)
            inside.copy_(x)
            small = x.nbytes <= ONE_SHOT
            total = (_one_shot if small else _two_shot)(inside, "sum", self.name)
            if residual is None:
                return total if small else x.copy_(total)  # the next sum goes where this one is
        return torch.add(residual, total if bias is None else total + bias, alpha=scale)

    def linear_sum(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor, scale: float = 1.0
    ) -> Tensor | None:
        """The same of all ranks' x times their weights, where one kernel does it."""
        if self.peers is None:
            return None
        if not torch.compiler.is_compiling():
            return linear_sum(x, weight, bias, residual, self.peers, scale)
        served = serves_linear_sum(x, weight, bias, residual)
        return linear_sum_of(x, weight, bias, residual, self.name, scale) if served else None

    def check(self, rank: int, size: int) -> str:
        """What is wrong with sums of small whole numbers, if anything. All ranks do all of it, but for a kernel of ours
        that is wrong, which is asked no more: one that waits in vain waits for minutes."""
        wrong = []
        for dtype, buffer in self.buffers.items():
            for nbytes in (ALIGNED, ONE_SHOT, 2 * ONE_SHOT, MOST):
                x = torch.full((nbytes // dtype.itemsize,), rank + 1, dtype=dtype, device=buffer.device)
                if not (self.sum(x) == size * (size + 1) // 2).all():
                    wrong.append(f"symmetric memory: a wrong sum of {nbytes} bytes of {dtype}")
        if self.peers is not None:
            for n in (8, ours.BLOCK + 8, ours.SLOT, ours.SLOT + 8, ours.turn(size) + ours.BLOCK):
                for turn in range(6 if n <= ours.SLOT else 2):  # each of three slots twice, each of two places once
                    place = (torch.arange(n, device=self.peers.bases.device) + turn) % 3
                    x = (place + rank % 2).bfloat16()
                    if not (self.sum(x, torch.ones_like(x), 2.0) == 1 + 2 * (size * place + size // 2)).all():
                        return f"symmetric memory: a wrong sum of {n} numbers by our kernel"
            place = torch.arange(4104, device=self.peers.bases.device)
            weight = (place % 7).bfloat16()[:, None].repeat(1, 64)
            for rows in (2, 5):
                row = torch.arange(rows, device=place.device)[:, None]
                for turn in range(4):  # each of two places twice
                    x = ((row + turn) % 3 + rank % 2).bfloat16().repeat(1, 64)
                    y = self.linear_sum(x, weight, None, 32.0 * ((place + row) % 5).bfloat16(), 0.5)
                    want = (place + row) % 5 + place % 7 * (size * ((row + turn) % 3) + size // 2)
                    if y is not None and not (y == 32 * want).all():
                        return f"symmetric memory: a wrong sum of products of {rows} rows by our kernel"
        return wrong[0] if wrong else ""

    def __str__(self) -> str:
        halves = "" if self.peers is None else f"bf16 and fp16 of up to {ours.MOST >> 19} MiB, "
        return f"symmetric memory ({halves}bf16 and fp32 of up to {MOST >> 20} MiB)"


def set_up(group: dist.ProcessGroup, device_type: str) -> tuple[SymmetricMemory | None, str]:
    """Symmetric memory between the ranks of a group that can have it and sum by it rightly, or none and why.

    All ranks of the group call this, and come to the same.
    """
    if device_type != "cuda":
        return None, f"symmetric memory is between GPUs, not on {device_type}"
    if group not in _known:
        # of one kind: what the programs of a kernel do, and how many they are, is alike on all ranks
        device = torch.device("cuda", torch.cuda.current_device())
        if len(set(of_all(group, (socket.gethostname(), machine(device))))) > 1:
            _known[group] = None, "symmetric memory is between GPUs of one kind in one machine"
        else:
            with torch.inference_mode(False):  # buffers of it could not be written to outside of it
                _known[group] = _made(group, device)
    return _known[group]


# Of a group, for as long as it lives: ranks must free and make such memory in one order, but models end when Python's
# garbage is collected, on each rank at another time.
_known: WeakKeyDictionary[dist.ProcessGroup, tuple[SymmetricMemory | None, str]] = WeakKeyDictionary()


def _made(group: dist.ProcessGroup, device: torch.device) -> tuple[SymmetricMemory | None, str]:
    symmetric, why = None, ""
    try:
        symmetric = SymmetricMemory(group, device)
    except (RuntimeError, ValueError) as error:
        why = f"symmetric memory: {error}"
    if why := agreed(group, why):
        return None, why
    assert symmetric is not None
    try:
        why = symmetric.check(dist.get_rank(group), dist.get_world_size(group))
    except RuntimeError as error:  # of an operation that is not there
        why = f"symmetric memory: {error}"
    why = agreed(group, why)
    return (None, why) if why else (symmetric, "")


def agreed(group: dist.ProcessGroup, why: str) -> str:
    """The first rank's reason that has one."""
    return next(filter(None, of_all(group, why.partition("\n")[0])), "")


def of_all(group: dist.ProcessGroup, given: Any) -> list[Any]:
    """What each rank of the group has given."""
    found: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, given, group=group)
    return found


def _shared(nbytes: int, group: dist.ProcessGroup, device: torch.device) -> tuple[Tensor, list[int]]:
    """Memory of this rank, zero, and where each rank's begins; the ranks agree that all have come so far before its
    use."""
    import torch.distributed._symmetric_memory as symmetric_memory

    memory = symmetric_memory.empty(nbytes, dtype=torch.uint8, device=device).zero_()
    handle = symmetric_memory.rendezvous(memory, group)
    inside = memory.data_ptr() - handle.buffer_ptrs[dist.get_rank(group)]  # the same on all ranks
    torch.cuda.synchronize(device)
    return memory, [address + inside for address in handle.buffer_ptrs]


def _one_shot(inside: Tensor, operation: str, name: str) -> Tensor:
    return torch.ops.symm_mem.one_shot_all_reduce(inside, operation, name)


def _two_shot(inside: Tensor, operation: str, name: str) -> Tensor:
    return torch.ops.symm_mem.two_shot_all_reduce_(inside, operation, name)
