"""ExpandableTensor: `torch.cat` appends in place, and nobody can tell but by the time it takes."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fms.utils.tensors import ExpandableTensor


def values(*shape: int) -> Tensor:
    return torch.randn(shape)


@pytest.mark.parametrize("dim", [0, 1, 2, -1])
def test_cat_appends_in_place_while_there_is_room(dim: int) -> None:
    shape = [3, 4, 5]
    shape[dim] = 2
    plain = values(*shape)
    grown = ExpandableTensor(plain, dim, preallocate_length=8)
    at = grown.data_ptr()
    for _ in range(3):
        more = values(*shape)
        plain, grown = torch.cat((plain, more), dim), torch.cat((grown, more), dim)
        assert isinstance(grown, ExpandableTensor)
        assert torch.equal(grown.plain(), plain)
        assert grown.data_ptr() == at
    grown = torch.cat((grown, more), dim)  # no room left: moved, and grown to twice the length
    assert grown.data_ptr() != at
    assert grown._room.buffer.shape[dim] == 20


def test_appends_cost_no_more_than_the_copies_of_doubling() -> None:
    grown, moves = ExpandableTensor(values(2, 1), 1), 0
    for _ in range(1000):
        at = grown.data_ptr()
        grown = torch.cat((grown, values(2, 1)), 1)
        moves += grown.data_ptr() != at
    assert grown.shape == (2, 1001)
    assert moves <= 10


def test_an_older_handle_keeps_its_values() -> None:
    first = ExpandableTensor(values(2, 3), 1, preallocate_length=16)
    before = first.plain().clone()
    second = torch.cat((first, values(2, 2)), 1)
    kept = second.plain().clone()
    third = torch.cat((first, values(2, 4)), 1)  # the place behind `first` is taken
    assert third.data_ptr() != first.data_ptr() == second.data_ptr()
    assert torch.equal(first.plain(), before)
    assert torch.equal(second.plain(), kept)
    assert torch.equal(third[:, :3], before)
    back = second.narrowed(3)
    assert torch.equal(torch.cat((back, values(2, 1)), 1)[:, :3], before)
    assert torch.equal(second.plain(), kept)


@given(data=st.data())
def test_it_equals_torch_cat(data: st.DataObject) -> None:
    """Any tree of appends, from any handle, along any dimension."""
    dim = data.draw(st.integers(-2, 1))
    size = lambda n: (3, n) if dim % 2 else (n, 3)
    start = values(*size(data.draw(st.integers(0, 3))))
    handles: list[tuple[Tensor, Tensor]] = [(start, ExpandableTensor(start, dim))]
    for _ in range(data.draw(st.integers(1, 8))):
        plain, grown = data.draw(st.sampled_from(handles))
        more = [values(*size(n)) for n in data.draw(st.lists(st.integers(0, 3), min_size=1, max_size=3))]
        handles.append((torch.cat((plain, *more), dim), torch.cat((grown, *more), dim)))
        assert isinstance(handles[-1][1], ExpandableTensor)
    for plain, grown in handles:
        assert torch.equal(grown.plain(), plain)


A = torch.arange(6.0).view(2, 3)


@pytest.mark.parametrize(
    "call",
    [
        lambda t: torch.cat((t, A), 1),
        lambda t: torch.cat((t, A), dim=0),
        lambda t: torch.cat((t, A), axis=1),
        lambda t: torch.cat(tensors=(t, A), dim=-2),
        lambda t: torch.concat((t, A)),
        lambda t: torch.concatenate((t, A)),
        lambda t: torch.cat((t, t)),
        lambda t: torch.cat((A, t)),
        lambda t: torch.cat([t]),
        lambda t: torch.cat((t, torch.zeros(0))),
        lambda t: torch.cat((t, A.double())),
        lambda t: [out := torch.empty(4, 3), torch.cat((t, A), out=out)][0],
        lambda t: t + 1,
        lambda t: t @ A.T,
        lambda t: t[1:, ::2],
        lambda t: t.clone(),
        lambda t: t.double(),
        lambda t: torch.stack((t, A)),
        copy.deepcopy,
        lambda t: torch.cat((copy.deepcopy(t), A)),
        lambda t: t.detach().mul_(2),
    ],
)
def test_what_else_is_done_gives_what_a_plain_tensor_gives(call) -> None:
    got, want = call(ExpandableTensor(A, 0)), call(A.clone())
    assert got.dtype == want.dtype
    assert torch.equal(got.as_subclass(Tensor), want)


@pytest.mark.parametrize(
    "more", [values(1, 4), values(2, 3, 1), values(3), values(1, 1, 3)], ids=lambda t: str(t.shape)
)
def test_what_does_not_fit_is_torchs_error(more: Tensor) -> None:
    with pytest.raises(RuntimeError, match=r"Sizes of tensors must match|Tensors must have same number of dimensions"):
        torch.cat((ExpandableTensor(A, 0), more))
    with pytest.raises(IndexError, match="Dimension out of range"):
        torch.cat((ExpandableTensor(A, 0), A), 2)


def test_gradients_flow_through_what_is_computed() -> None:
    weight = values(3).requires_grad_()
    (torch.cat((ExpandableTensor(A, 0), A)) * weight).sum().backward()
    assert torch.allclose(weight.grad, 2 * A.sum(0))


def test_gradients_flow_through_what_is_appended() -> None:
    start, more = A.clone().requires_grad_(), A.clone().requires_grad_()
    factors = values(4, 3)
    (torch.cat((ExpandableTensor(start, 0), more)) * factors).sum().backward()
    assert torch.equal(start.grad, factors[:2])
    assert torch.equal(more.grad, factors[2:])


def test_narrowing_errors() -> None:
    for length in (-1, 3):
        with pytest.raises(ValueError, match=f"cannot narrow 2 places to {length}"):
            ExpandableTensor(A, 0).narrowed(length)
