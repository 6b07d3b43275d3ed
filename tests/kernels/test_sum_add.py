"""Sums and choices of several ranks in one kernel. Memory of all ranks lies in one process here: on a CPU the others
have come before, on a GPU each rank has a stream of its own."""

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fms.distributed.symmetric import SymmetricMemory
from fms.kernels import linear_sum, next_token, sum_add
from fms.kernels.launching import Machine
from fms.kernels.next_token import make_rows
from fms.kernels.sum_add import BLOCKS, FLAGS, ROWS, Peers, make_peers, parts_at, products_at, room, shares_at

# Ranks that wait for each other must not share a queue of the device's, of which there are eight where nothing is said.
os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")


def together(size: int, device: str) -> tuple[list[Tensor], list[Peers]]:
    memory = [torch.zeros(room(size) // 8, dtype=torch.long, device=device) for _ in range(size)]
    addresses = [m.data_ptr() for m in memory]
    return memory, [make_peers(addresses, rank, torch.device(device)) for rank in range(size)]


def wanted(parts: list[Tensor], residual: Tensor | None, scale: float, bias: Tensor | None) -> Tensor:
    total = torch.zeros_like(parts[0], dtype=torch.float32)
    for part in parts:
        total += part.float()
    if bias is not None:
        total += bias.float()
    return (total if residual is None else residual.float() + scale * total).to(parts[0].dtype)


def flags(memory: Tensor, size: int) -> Tensor:
    """(flag, rank)"""
    return memory[FLAGS // 8 : parts_at(size) // 8].view(sum_add.BLOCKS + ROWS, size)


def part(memory: Tensor, size: int, time: int, rank: int) -> Tensor:
    """What this rank has written there, the `time`th time: pairs of elements, each with the count of times."""
    return memory[parts_at(size) // 8 : shares_at(size) // 8].view(3, size, sum_add.SLOT // 2)[time % 3, rank]


def stamped(y: Tensor, time: int) -> Tensor:
    return y.flatten().view(torch.int32).long() & 0xFFFFFFFF | time << 32


@pytest.mark.parametrize(("size", "rank", "time"), [(2, 0, 0), (2, 1, 5), (4, 2, 1)])
@pytest.mark.parametrize("with_residual", [False, True])
def test_a_sum_with_others_that_were_there_before(
    interpreted: torch.device, size: int, rank: int, time: int, with_residual: bool
) -> None:
    memory, peers = together(size, "cpu")
    parts = [torch.randn(3, 704).half() for _ in range(size)]
    residual, bias = (torch.randn(3, 704).half(), torch.randn(704).half()) if with_residual else (None, None)
    mine = peers[rank]
    mine.times.fill_(time)
    pairs = parts[0].numel() // 2
    for r in range(size):
        if r != rank:
            part(memory[rank], size, time + 1, r)[:pairs] = stamped(parts[r], time + 1)
            part(memory[rank], size, time + 2, r)[:pairs] = -1  # some are ahead
    got = sum_add.sum_add(parts[rank], mine, residual, 0.5, bias)
    torch.testing.assert_close(got, wanted(parts, residual, 0.5, bias), rtol=1e-3, atol=1e-3)
    assert mine.times.tolist() == [time + 1] * 3 + [time] * (len(mine.times) - 3)
    for r in range(size):
        if r != rank:
            assert torch.equal(part(memory[r], size, time + 1, rank)[:pairs], stamped(parts[rank], time + 1))
            assert not part(memory[r], size, time + 1, rank)[pairs:].any()


def test_elements_that_begin_anywhere(interpreted: torch.device) -> None:
    memory, peers = together(2, "cpu")
    y, residual, bias, other = (torch.randn(17).half()[1:] for _ in range(4))
    part(memory[0], 2, 1, 1)[:8] = stamped(other.clone(), 1)
    got = sum_add.sum_add(y, peers[0], residual, 2.0, bias)
    torch.testing.assert_close(got, wanted([y, other], residual, 2.0, bias), rtol=1e-3, atol=1e-3)
    assert all(t.data_ptr() % 4 == 2 for t in (y, residual, bias))


def test_a_residual_of_another_type(interpreted: torch.device) -> None:
    """As in blocks of fp32 under autocast."""
    memory, peers = together(2, "cpu")
    y, other = torch.randn(8).half(), torch.randn(8).half()
    residual, bias = torch.randn(8), torch.randn(8)
    part(memory[0], 2, 1, 1)[:4] = stamped(other, 1)
    sums = SymmetricMemory.__new__(SymmetricMemory)
    sums.peers = peers[0]
    got = sums.sum(y, residual, 0.5, bias)
    torch.testing.assert_close(got, residual + 0.5 * ((y + other).float() + bias))


@pytest.mark.parametrize("size", [2, 3, 8])
def test_what_all_ranks_try_first(size: int) -> None:
    """With sums that are right nothing is wrong; with one that is not, something is."""
    sums = SymmetricMemory.__new__(SymmetricMemory)
    sums.buffers, sums.peers = {}, make_peers([0] * size, 0, torch.device("cpu"))
    asked: list[int] = []

    def right(x: Tensor, residual: Tensor, scale: float) -> Tensor:
        asked.append(x.numel())
        return (residual.float() + scale * (x.float() * size + size // 2)).to(x.dtype)  # every other rank has 1 more

    def right_too(x: Tensor, weight: Tensor, bias: None, residual: Tensor, scale: float) -> Tensor:
        one, more = x.float() @ weight.float().T, weight.float().sum(1)  # every other rank's x has 1 more
        return (residual.float() + scale * (one * size + more * (size // 2))).to(x.dtype)

    sums.sum, sums.linear_sum = right, right_too  # type: ignore[assignment, method-assign]
    assert sums.check(0, size) == ""
    assert asked.count(8) == 6
    sums.linear_sum = lambda *given: None  # type: ignore[method-assign]
    assert sums.check(0, size) == ""
    sums.linear_sum = lambda *given: right_too(*given).roll(1)  # type: ignore[method-assign]
    assert "a wrong sum of products" in sums.check(0, size)
    sums.sum = lambda *given: right(*given).roll(1)  # type: ignore[assignment, method-assign]
    assert "a wrong sum of 8 numbers" in sums.check(0, size)


def test_a_rank_that_never_comes_ends_the_wait(interpreted: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sum_add, "WAIT", 3)
    _, peers = together(2, "cpu")
    assert sum_add.sum_add(torch.ones(8).half(), peers[0]).isnan().all()
    monkeypatch.setattr(linear_sum, "serves", lambda x, weight: True)
    x, weight = torch.ones(2, 16).half(), torch.ones(64, 16).half()
    got = linear_sum.linear_sum(x, weight, None, torch.ones(2, 64).half(), peers[0])
    assert got is not None
    assert got.isnan().all()


@pytest.mark.parametrize("ours", [2.0, -2.0])
@pytest.mark.parametrize("theirs", [9.0, -9.0, -1.0, float("nan"), 2.0, -2.0])
def test_a_choice_with_others_that_were_there_before(interpreted: torch.device, ours: float, theirs: float) -> None:
    """Ours are the ids from 30 on, theirs those before; of equals the first is chosen."""
    memory, peers = together(2, "cpu")
    logits = torch.full((1, 30), -5.0)
    logits[0, 7] = ours
    rows = make_rows(1, [3], torch.device("cpu"))
    rows.ends.fill_(9)
    rows.going.fill_(1)
    bits = int(torch.tensor(float("inf") if theirs != theirs else theirs).view(torch.int32))
    ordered = bits ^ 0x7FFFFFFF if bits < 0 else bits
    memory[0][0] = (ordered << 32) | (0x7FFFFFFF - 11)
    flags(memory[1], 2)[BLOCKS, 0] = 1
    next_token._launch(logits, rows, peers[1], 30)
    if theirs != theirs:
        assert rows.tokens.tolist() == [-1]
    else:
        assert rows.tokens.tolist() == [37 if theirs < ours else 11]
        assert rows.fed.tolist() == [rows.tokens.tolist()]
    assert flags(memory[0], 2)[BLOCKS, 1] == 1


def in_turn(memory: list[Tensor], peers: list[Peers], work: Callable[[int], Any], times: int) -> list[list[Any]]:
    """What each rank's kernels gave, `times` times on a stream of its own, on one GPU; before, each alone as if the
    others had been there. For to compile, to load a kernel and to find memory can all wait until the device is idle."""
    streams = [torch.cuda.Stream() for _ in peers]
    found: list[list[Any]] = [[] for _ in peers]

    def run(rank: int) -> None:
        with torch.cuda.stream(streams[rank]):
            found[rank].append(work(rank))

    size = len(peers)
    for one in peers:
        one.times.zero_()
    for rank in range(size):
        flags(memory[rank], size)[:] = 1 << 40
        for time in range(times):
            torch.cuda.synchronize()
            memory[rank][parts_at(size) // 8 : shares_at(size) // 8] = time + 1 << 32
            memory[rank][products_at(size) // 8 :] = time + 1 << 32
            torch.cuda.synchronize()
            run(rank)
        torch.cuda.synchronize()
        found[rank].clear()
    for one in (*memory, *(one.times for one in peers)):
        one.zero_()
    torch.cuda.synchronize()
    for _ in range(times):
        for rank in range(len(peers)):
            run(rank)
    torch.cuda.synchronize()
    return found


@pytest.mark.gpu
@pytest.mark.parametrize("size", [2, 4, 8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sums_on_a_gpu(size: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    check_sums(size, dtype, [((2, 1, 4096), 1000), ((1, 1, 40), 50), ((7, 1, 2056), 50)], monkeypatch)


@pytest.mark.gpu
@pytest.mark.parametrize("size", [2, 3, 4])
def test_larger_sums_on_a_gpu(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """By few programs: those of all ranks, and of the kernels behind that are launched early, are to have room on one
    GPU. Of one round, of several, and small ones between."""
    few = {"BLOCKS": 16, "SLOT": 16 * sum_add.BLOCK, "TURN": 300_000}
    for name, value in few.items():
        monkeypatch.setattr(sum_add, name, value)
    shapes = [((2, 65, 1024), 300), ((3, 1025, 256), 100), ((2, 1, 4096), 20), ((2, 65, 4096), 100)]
    check_sums(size, torch.bfloat16, shapes, monkeypatch)


def check_sums(
    size: int, dtype: torch.dtype, shapes: list[tuple[tuple[int, ...], int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sum_add, "WAIT", 1 << 22)
    memory, peers = together(size, "cuda")
    for shape, times in shapes:
        parts = [torch.randn(*shape, device="cuda").to(dtype) for _ in range(size)]
        residual = torch.randn(*shape, device="cuda").to(dtype)
        want = wanted(parts, residual, 0.5, None)

        def work(rank: int, parts: list[Tensor] = parts, residual: Tensor = residual) -> Tensor:
            return sum_add.sum_add(parts[rank], peers[rank], residual, 0.5)

        each = [torch.stack(one) for one in in_turn(memory, peers, work, times)]
        torch.testing.assert_close(each[0][0], want, rtol=1e-2, atol=1e-2)
        assert all(torch.equal(one, each[0][:1].expand_as(one)) for one in each)


@pytest.mark.gpu
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_products_on_a_gpu(size: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """As for some of the GPU's multiprocessors, so that there is room for all ranks'. Weights that are read in one part
    and in two, one row, two and more, and other sums between."""
    monkeypatch.setattr(sum_add, "WAIT", 1 << 22)
    monkeypatch.setattr(linear_sum, "machine", lambda device: Machine(16, torch.cuda.get_device_capability()[0] >= 9))
    memory, peers = together(size, "cuda")
    few = ((2, 4096, 2048, 1000), (1, 1032, 1376, 100), (2, 2056, 5120, 100), (2, 200, 64, 100))
    more = ((8, 520, 2048, 1000), (32, 264, 5120, 100), (5, 40, 64, 100))
    for rows, n, k, times in few + more:
        xs = [torch.randn(3, rows, 1, k, device="cuda").to(dtype) for _ in range(size)]
        weights = [(torch.randn(n, k, device="cuda") / k**0.5).to(dtype) for _ in range(size)]
        residual, bias = torch.randn(rows, 1, n, device="cuda").to(dtype), torch.randn(n, device="cuda").to(dtype)
        products = sum(x.float() @ weight.float().T for x, weight in zip(xs, weights, strict=True))
        wants = residual.float() + 0.5 * (products + bias.float())
        calls = [0] * size  # x differs from time to time, and from the one that was in the same place before

        def work(rank: int, xs=xs, weights=weights, residual=residual, bias=bias, calls=calls) -> Tensor:
            x = xs[rank][calls[rank] % 3]
            calls[rank] += 1
            first = linear_sum.linear_sum(x, weights[rank], bias, residual, peers[rank], 0.5)
            assert first is not None
            return torch.stack((first, sum_add.sum_add(residual, peers[rank])))

        each = [torch.stack(one) for one in in_turn(memory, peers, work, times)]
        for turn in range(3):
            found, want = [one[turn::3] for one in each], wants[(times + turn) % 3]
            torch.testing.assert_close(found[0][0, 0].float(), want, rtol=2e-2, atol=2e-2)
            torch.testing.assert_close(found[0][0, 1].float(), size * residual.float(), rtol=1e-2, atol=1e-2)
            assert all(torch.equal(one, found[0][:1].expand_as(one)) for one in found)


@pytest.mark.gpu
@pytest.mark.parametrize("size", [2, 4])
def test_choices_on_a_gpu(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sum_add, "WAIT", 1 << 22)
    memory, peers = together(size, "cuda")
    logits = torch.randn(3, size * 5000, device="cuda").bfloat16()
    want = torch.stack([(row == row.max()).nonzero()[0, 0] for row in logits])
    rows = [make_rows(3, [], torch.device("cuda")) for _ in range(size)]
    for one in rows:
        one.ends.fill_(5000)
        one.going.fill_(1)
    shares = [share.contiguous() for share in logits.split(5000, -1)]

    def work(rank: int) -> None:
        next_token.choose_greedily(shares[rank], rows[rank], peers[rank], rank * 5000)

    in_turn(memory, peers, work, 1000)
    for one in rows:
        assert torch.equal(one.tokens, want)
        assert one.lengths.flatten().tolist() == [2000] * 3


@pytest.mark.parametrize("size", [2, 3, 4, 8])
def test_the_memory_has_room_for_everything(size: int) -> None:
    assert FLAGS % 16 == parts_at(size) % 16 == 0
    assert flags(torch.zeros(room(size) // 8, dtype=torch.long), size).numel() == (BLOCKS + ROWS) * size
    for_one, for_all = (
        sum_add.products(make_peers([0] * size, 0, torch.device("cpu")), tiles) for tiles in (False, True)
    )
    assert for_one["PARTS"] % 16 == for_all["PARTS"] % 16 == 0
    for at, end in ((for_one, for_all["PARTS"]), (for_all, room(size))):
        assert end - at["PARTS"] == 2 * size * at["PROGRAMS"] * at["PAIRS"] * 8
    assert for_all["TIMES"] == for_one["TIMES"] + for_one["PROGRAMS"]
