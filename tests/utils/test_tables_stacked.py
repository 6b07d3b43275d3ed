"""Rules that stack tensors, take them along another dimension or transpose them: both ways, and in slices."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fms.models.granite4 import HF as GRANITE4
from fms.models.granite4 import GraniteMoeHybridConfig
from fms.models.mixtral import EXPERTS, FMS_EXPERTS, MISTRAL, MixtralConfig
from fms.utils.serialization.errors import CheckpointError
from fms.utils.serialization.tables import Part, Rows, Rule, Stack, entries, match
from fms.utils.serialization.writers import Entry

TABLES: dict[str, list[Rule]] = {
    "hf": EXPERTS,
    "hf, in memory": EXPERTS[4:],
    "mistral": MISTRAL,
    "mistral, later": [rule for rule in MISTRAL if "block_sparse_moe" not in rule[0]],
    "fms": FMS_EXPERTS,
    "granite 4": GRANITE4,
}
ONE_KEY = {  # an expert's weight is one tensor, or a slice of one
    "hf": "model.layers.1.block_sparse_moe.experts.2.w1.weight",
    "mistral, later": "layers.1.feed_forward.experts.2.w1.weight",
    "mistral": "layers.1.block_sparse_moe.w1",
}


class Held:
    """A reader of tensors in memory that notes what it was asked for."""

    def __init__(self, tensors: dict[str, Tensor]):
        self.tensors, self.files = tensors, [Path("held.safetensors")]
        self.asked: dict[str, int] = {}

    def keys(self) -> list[str]:
        return list(self.tensors)

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self.tensors[key].shape)

    def dtype(self, key: str) -> torch.dtype:
        return self.tensors[key].dtype

    def read(self, key: str, index: tuple[slice, ...] = ()) -> Tensor:
        assert len(index) <= self.tensors[key].dim()
        found = self.tensors[key][index].clone()
        self.asked[key] = self.asked.get(key, 0) + found.numel()
        return found


def config(source: str, experts: int = 4, hidden: int = 3, emb: int = 5) -> MixtralConfig | GraniteMoeHybridConfig:
    fields = {"emb_dim": emb, "nlayers": 2, "num_experts": experts, "top_k_experts": 1}
    if source == "granite 4":
        return GraniteMoeHybridConfig(**fields, expert_dim=hidden, hidden_dim=hidden + 1)
    return MixtralConfig(**fields, hidden_dim=hidden)


def state_of(source: str, experts: int, hidden: int, emb: int) -> dict[str, Tensor]:
    """What tables of experts are for; every element of every tensor is another number."""
    ff = "ff.routed" if source == "granite 4" else "ff"
    shapes: dict[str, tuple[int, ...]] = {}
    for i in range(2):
        shapes[f"layers.{i}.{ff}.gate.weight"] = (experts, emb)
        shapes |= {f"layers.{i}.{ff}.experts.{name}": (experts, hidden, emb) for name in ("wg", "w1")}
        shapes[f"layers.{i}.{ff}.experts.w2"] = (experts, emb, hidden)
    sizes = [torch.Size(shape).numel() for shape in shapes.values()]
    parts = torch.arange(sum(sizes), dtype=torch.float64).split(sizes)
    return {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}


def entry(name: str, tensor: Tensor) -> Entry:
    return Entry(name, tuple(tensor.shape), tensor.dtype, lambda: tensor)


def written(rules: list[Rule], state: dict[str, Tensor], c: object) -> Held:
    """What a format holds for a state dict."""
    return Held({e.name: e.made() for e in entries(rules, [entry(*item) for item in state.items()], c)})


@pytest.mark.parametrize("source", TABLES)
def test_a_table_reads_what_it_writes(source: str) -> None:
    c, state = config(source), state_of(source, 4, 3, 5)
    held = written(TABLES[source], state, c)
    parts, unknown = match(TABLES[source], reversed(held.keys()), c)
    assert not unknown
    assert parts.keys() == state.keys()
    for name, tensor in state.items():
        assert parts[name].shape(held) == tensor.shape
        assert torch.equal(parts[name].read(held), tensor), name


@st.composite
def slices_of_parts(draw) -> tuple[str, tuple[int, int, int], str, tuple[slice, ...]]:
    """A table, sizes, one of its parameters and a slice of that."""
    source = draw(st.sampled_from(sorted(TABLES)))
    sizes = (draw(st.integers(1, 12)), draw(st.integers(1, 5)), draw(st.integers(1, 6)))
    state = state_of(source, *sizes)
    name = draw(st.sampled_from(sorted(state)))

    def within(size: int) -> slice:
        first = draw(st.integers(0, size))
        return draw(st.sampled_from([slice(first, draw(st.integers(first, size))), slice(None), slice(first, None)]))

    shape = state[name].shape
    return source, sizes, name, tuple(within(size) for size in shape[: draw(st.integers(0, len(shape)))])


@given(slices_of_parts())
def test_a_slice_of_a_part_is_the_slice_of_the_whole(case) -> None:
    source, sizes, name, index = case
    c, state = config(source, *sizes), state_of(source, *sizes)
    held = written(TABLES[source], state, c)
    got = match(TABLES[source], held.keys(), c)[0][name].read(held, index)
    assert got.shape == state[name][index].shape
    assert got.is_contiguous()
    assert torch.equal(got, state[name][index])


@pytest.mark.parametrize("source", ONE_KEY)
def test_only_what_is_needed_is_read(source: str) -> None:
    c, state = config(source), state_of(source, 4, 3, 5)
    held = written(TABLES[source], state, c)
    parts, _ = match(TABLES[source], held.keys(), c)
    part = parts["layers.1.ff.experts.wg"]
    part.read(held, (slice(2, 3),))
    assert held.asked == {ONE_KEY[source]: 3 * 5}
    held.asked.clear()
    part.read(held, (slice(2, 3), slice(1, 2), slice(0, 4)))
    assert held.asked == {ONE_KEY[source]: 4}
    held.asked.clear()
    part.read(held, (slice(2, 2),))
    assert not held.asked


def test_a_part_along_another_dimension_reads_only_that() -> None:
    held = Held({"x": torch.arange(24).view(2, 4, 3)})
    part = Part("x", slice(2, 4), dim=1)
    assert part.shape(held) == (2, 2, 3)
    assert part.read(held, (slice(1, 2), slice(1, 2))).tolist() == [[[21, 22, 23]]]
    assert held.asked == {"x": 3}
    gathered = Part("x", torch.tensor([3, -1, 0]), dim=1)
    assert gathered.read(held)[0].tolist() == [[9, 10, 11], [0, 0, 0], [0, 1, 2]]


def test_a_transposed_part() -> None:
    held = Held({"x": torch.arange(6).view(2, 3)})
    part = Part("x", slice(0, 2), turned=True)
    assert part.shape(held) == (3, 2)
    assert part.read(held).tolist() == [[0, 3], [1, 4], [2, 5]]
    assert part.read(held, (slice(1, 3), slice(1, 2))).tolist() == [[4], [5]]


def test_experts_are_counted_not_sorted_by_name() -> None:
    rules: list[Rule] = [("e.*.*.weight", "layers.*.w")]
    held = Held({f"e.7.{i}.weight": torch.tensor([float(i)]) for i in (10, 2, 0, 1, 3, 4, 5, 6, 7, 8, 9)})
    parts, _ = match(rules, held.keys(), None)
    assert parts["layers.7.w"].read(held).flatten().tolist() == list(range(11))


def test_a_fused_tensor_of_each_expert() -> None:
    """A rule may both stack and split."""
    rules: list[Rule] = [("e.*.up", ("wg", "w1"), lambda c: [slice(0, 2), slice(2, 3)])]
    state = {"wg": torch.arange(12.0).view(3, 2, 2), "w1": torch.arange(6.0).view(3, 1, 2)}
    held = written(rules, state, None)
    assert held.keys() == ["e.0.up", "e.1.up", "e.2.up"]
    assert held.shape("e.1.up") == (3, 2)
    parts, _ = match(rules, held.keys(), None)
    assert all(torch.equal(parts[name].read(held), tensor) for name, tensor in state.items())


def test_a_stacked_parameter_is_made_once_for_all_its_tensors() -> None:
    made = []

    def make() -> Tensor:
        made.append(1)
        return torch.arange(6.0).view(3, 2)

    found = entries([("e.*", "w")], [Entry("w", (3, 2), torch.float32, make)], None)
    assert [e.made().tolist() for e in found] == [[0, 1], [2, 3], [4, 5]]
    assert len(made) == 1
    assert found[2].made().tolist() == [4, 5]  # it was let go, and is made again


def test_what_can_not_be_stacked() -> None:
    rules: list[Rule] = [("e.*", "w"), ("whole", "w"), ("f.*", "w")]
    for keys, message in {
        ("e.0", "e.1", "e.4"): r"w is stacked of tensors like e\.0: there is no number 2, 3",
        ("e.1", "e.2"): r"no number 0",
        ("e.0", "whole"): r"w is given twice, by e\.0 and by whole",
        ("whole", "e.0"): r"w is given twice, by whole and by e\.0",
        ("e.0", "e.1", "f.1"): r"w is given twice, by e\.1 and by f\.1",
    }.items():
        with pytest.raises(CheckpointError, match=message):
            match(rules, keys, None)
    held = Held({"e.0": torch.zeros(2), "e.1": torch.zeros(3)})
    part = match(rules, held.keys(), None)[0]["w"]
    assert isinstance(part, Stack)
    with pytest.raises(CheckpointError, match=r"e\.0 has shape \[2\], but e\.1 has \[3\]"):
        part.shape(held)


def test_rows_left_over_are_seen_along_any_dimension() -> None:
    part = match([("x", ("a", "b"), lambda c: [Rows(slice(0, 2), 1), Rows(slice(2, 4), 1)])], ["x"], None)[0]
    assert [(p.dim, p.end) for p in part.values()] == [(1, 2), (1, 4)]
