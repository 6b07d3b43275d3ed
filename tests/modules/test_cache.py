"""Caches: whatever way tokens go in, what comes out is what one pass gives."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fms.models import Decoder, freeze
from fms.modules.cache import StaticCache
from fms.utils.tensors import GrowingCache
from tests.small import small_model

VOCABULARY = 24
DYNAMIC = {"kind": "dynamic", "factor": 4.0, "original_max_len": 8}


@pytest.fixture(scope="module", params=[False, True], ids=["", "frozen"])
def model(request: pytest.FixtureRequest) -> Decoder:
    return freeze(small_model()) if request.param else small_model()


def ids(*shape: int) -> Tensor:
    return torch.randint(VOCABULARY, shape)


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, atol=3e-5, rtol=0)


def make(kind: str, model: Decoder) -> tuple[int, Any]:
    """Rows, and an empty cache for them."""
    if kind == "growing":
        return 1, GrowingCache(model.config.nlayers)
    cache = model.make_cache(2, 32)
    cache.later = kind == "no mask"  # as on a GPU
    return 2, cache


either = pytest.mark.parametrize("kind", ["static", "no mask", "growing"])


@either
@pytest.mark.parametrize("sizes", [[20], [7, 13], [1] * 20, [3, 1, 5, 1, 1, 9], [19, 1], [1, 19]], ids=str)
@torch.no_grad()
def test_chunks_equal_one_pass(model: Decoder, kind: str, sizes: list[int]) -> None:
    rows, cache = make(kind, model)
    tokens = ids(rows, 20)
    close(torch.cat([model(chunk, cache=cache) for chunk in tokens.split(sizes, 1)], 1), model(tokens))
    assert cache.held() == [20] * rows


@either
@torch.no_grad()
def test_rewind_and_go_another_way(model: Decoder, kind: str) -> None:
    rows, cache = make(kind, model)
    tokens, other = ids(rows, 12), ids(rows, 6)
    model(tokens, cache=cache)
    cache.rewind([5] * rows)
    close(model(other, cache=cache), model(torch.cat((tokens[:, :5], other), 1))[:, 5:])
    cache.rewind([0] * rows)
    close(model(other, cache=cache), model(other))


@torch.no_grad()
def check_ragged(model: Decoder, widths: Sequence[int], lengths: Sequence[Sequence[int]], take: bool) -> None:
    """Feed rows padded to a width again and again, keeping of each only so many; compare with each row alone."""
    batch = len(lengths[0])
    cache, kept, got = model.make_cache(batch, 32), [ids(0)] * batch, [torch.zeros(0, VOCABULARY)] * batch
    for width, keep in zip(widths, lengths, strict=True):
        tokens, before = ids(batch, width), cache.held()
        if take:
            cache.take = torch.tensor(keep)[:, None]
        logits = model(tokens, cache=cache)
        if not take:
            cache.rewind([have + n for have, n in zip(before, keep, strict=True)])
        kept = [torch.cat((row, more[:n])) for row, more, n in zip(kept, tokens, keep, strict=True)]
        got = [torch.cat((row, more[:n])) for row, more, n in zip(got, logits, keep, strict=True)]
    assert cache.held() == [len(row) for row in kept]
    for row, logits in zip(kept, got, strict=True):
        if len(row):
            close(logits, model(row[None])[0])


@pytest.mark.parametrize("take", [False, True], ids=["rewind", "take"])
def test_ragged_rows(model: Decoder, take: bool) -> None:
    check_ragged(model, [6, 1, 1, 4, 3], [[6, 2, 3], [1, 1, 1], [1, 1, 1], [1, 4, 2], [3, 3, 3]], take)


@given(data=st.data())
def test_ragged_rows_of_any_kind(data: st.DataObject) -> None:
    batch = data.draw(st.integers(1, 3))
    widths = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=5))
    lengths = [[data.draw(st.integers(0, width)) for _ in range(batch)] for width in widths]
    check_ragged(SHARED, widths, lengths, data.draw(st.booleans()))


SHARED = freeze(small_model())


@torch.no_grad()
def test_rows_of_equal_length_again_are_uniform(model: Decoder) -> None:
    cache = model.make_cache(2, 32)
    model(ids(2, 6), cache=cache)
    cache.rewind([3, 5])
    assert cache.lengths is not None
    cache.rewind([3, 3])
    assert cache.lengths is None


def test_the_buffers_are_allocated_once() -> None:
    model, cache = SHARED, SHARED.make_cache(2, 32)
    at = [(layer.k.data_ptr(), layer.v.data_ptr()) for layer in cache.layers]
    with torch.no_grad():
        for n in (5, 1, 4):
            model(ids(2, n), cache=cache)
    assert [(layer.k.data_ptr(), layer.v.data_ptr()) for layer in cache.layers] == at
    k, v = cache.layers[0].update(torch.ones(2, 2, 4, 8), torch.ones(2, 2, 4, 8))
    assert k.shape == v.shape == (2, 2, 10, 8)
    assert k.data_ptr() == at[0][0]


@torch.no_grad()
def test_errors() -> None:
    model, cache = SHARED, SHARED.make_cache(2, 8)
    model(ids(2, 6), cache=cache)
    with pytest.raises(ValueError, match="6 tokens in the cache and 3 new ones are more than its max_len=8"):
        model(ids(2, 3), cache=cache)
    assert cache.held() == [6, 6]
    for lengths in ([7, 6], [-1, 0], [6]):
        with pytest.raises(ValueError, match=r"cannot rewind rows of \[6, 6\] tokens to"):
            cache.rewind(lengths)
    with pytest.raises(ValueError, match="49 positions are more than the 48"):
        model.make_cache(1, 49)
    growing = GrowingCache(2)
    model(ids(1, 3), cache=growing)
    for n in (4, -1):
        with pytest.raises(ValueError, match=f"cannot rewind a row of 3 tokens to {n}"):
            growing.rewind([n])


@torch.no_grad()
def test_a_cache_keeps_the_dtype_and_device_of_the_model() -> None:
    cache = small_model().bfloat16().make_cache(1, 4)
    assert isinstance(cache, StaticCache)
    assert cache.layers[0].k.dtype == torch.bfloat16


@torch.no_grad()
def test_dynamic_frequencies_are_those_of_the_final_length() -> None:
    model, tokens = small_model(rope_scaling=DYNAMIC), ids(2, 20)
    cache = model.make_cache(2, 20)
    close(torch.cat([model(chunk, cache=cache) for chunk in tokens.split([5, 1, 14], 1)], 1), model(tokens))
    cache = model.make_cache(2, 32)
    cache.span = torch.tensor([[20], [6]])  # a length a row
    got = torch.cat([model(chunk, cache=cache) for chunk in tokens.split([5, 1, 14], 1)], 1)
    close(got[:1], model(tokens[:1]))
    close(got[1:, :6], model(tokens[1:, :6]))
    with pytest.raises(ValueError, match="dynamic rotary scaling needs to know how long"):
        model(tokens[:1], cache=GrowingCache(2))
