"""Weight tables: both ways, in slices, and what they say of a checkpoint that does not fit."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fms.models import get_model
from fms.models.convert import save_model
from fms.models.llama import FMS, GGUF, HF, META, LLaMAConfig
from fms.utils.config import DecoderConfig
from fms.utils.serialization.errors import CheckpointError
from fms.utils.serialization.readers import SafetensorsReader
from fms.utils.serialization.tables import Part, Rule, entries, match, neighbours_to_halves
from fms.utils.serialization.writers import Entry, write_safetensors

TABLES = {"hf": HF, "meta": META, "gguf": GGUF, "fms": FMS}


class Held:
    """A reader of tensors in memory that notes how many rows it was asked for."""

    def __init__(self, tensors: dict[str, Tensor]):
        self.tensors = tensors
        self.files = [Path("held.safetensors")]
        self.rows = 0

    def keys(self) -> list[str]:
        return list(self.tensors)

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self.tensors[key].shape)

    def dtype(self, key: str) -> torch.dtype:
        return self.tensors[key].dtype

    def read(self, key: str, index: tuple[slice, ...] = ()) -> Tensor:
        found = self.tensors[key][index].clone()
        self.rows += len(found)
        return found


def entry(name: str, tensor: Tensor) -> Entry:
    return Entry(name, tuple(tensor.shape), tensor.dtype, lambda: tensor)


def written(rules: list[Rule], state: dict[str, Tensor], config: object) -> Held:
    """What a format holds for a state dict."""
    return Held({e.name: e.made() for e in entries(rules, [entry(*item) for item in state.items()], config)})


def config(nheads: int = 4, group: int = 2, head_dim: int = 6, emb_dim: int = 10, **fields: object) -> LLaMAConfig:
    sizes = {"src_vocab_size": 11, "nlayers": 2, "hidden_dim": 14, "max_expected_seq_len": 8, "attn_bias": True}
    return LLaMAConfig(nheads=nheads, kvheads=nheads // group, head_dim=head_dim, emb_dim=emb_dim, **sizes, **fields)


def shapes_of(c: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """Of what a LLaMA's state dict holds."""
    q, kv, d, h = c.nheads * c.head_dim, c.kvheads * c.head_dim, c.emb_dim, c.hidden_dim
    linears = {"attn.query": (q, d), "attn.key": (kv, d), "attn.value": (kv, d), "attn.dense": (d, q)}
    linears |= {"ff.wg": (h, d), "ff.w1": (h, d), "ff.w2": (d, h)}
    shapes: dict[str, tuple[int, ...]] = {"embedding.weight": (c.src_vocab_size, d)}
    for i in range(c.nlayers):
        shapes |= {f"layers.{i}.{norm}.weight": (d,) for norm in ("ln", "ff_ln")}
        shapes |= {f"layers.{i}.{name}.weight": shape for name, shape in linears.items()}
        biased = [name for name in linears if (c.attn_bias if "attn" in name else c.mlp_bias)]
        shapes |= {f"layers.{i}.{name}.bias": linears[name][:1] for name in biased}
    head = {} if c.tie_heads else {"head.weight": (c.src_vocab_size, d)}
    return shapes | {"dec_norm.weight": (d,)} | head


def state_of(c: DecoderConfig) -> dict[str, Tensor]:
    """Every element of every tensor is another number."""
    sizes = {name: torch.Size(shape).numel() for name, shape in shapes_of(c).items()}
    parts = torch.arange(sum(sizes.values()), dtype=torch.float64).split(list(sizes.values()))
    return {name: part.view(shape) for (name, shape), part in zip(shapes_of(c).items(), parts, strict=True)}


@pytest.mark.parametrize("source", TABLES)
@pytest.mark.parametrize("fields", [{}, {"tie_heads": True}, {"mlp_bias": True}, {"group": 1}, {"group": 4}])
def test_a_table_reads_what_it_writes(source, fields):
    c = config(**fields)
    state = state_of(c)
    held = written(TABLES[source], state, c)
    parts, unknown = match(TABLES[source], held.keys(), c)
    assert not unknown
    assert parts.keys() == state.keys()
    for name, tensor in state.items():
        assert parts[name].shape(held) == tensor.shape
        assert torch.equal(parts[name].read(held), tensor), name


def test_the_rotary_orders():
    """A head's rows a b c | d e f (pairs a-d, b-e, c-f) stand as a d b e c f where neighbours pair."""
    c = config(nheads=2, group=2, emb_dim=1)
    rows = torch.arange(12.0)[:, None]
    halves = {"layers.0.attn.query.weight": rows, "layers.0.attn.key.weight": rows[:6]}
    held = written(META, halves, c)
    assert held.tensors["layers.0.attention.wq.weight"].flatten().tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]
    assert held.tensors["layers.0.attention.wk.weight"].flatten().tolist() == [0, 3, 1, 4, 2, 5]
    assert neighbours_to_halves(1, 6).tolist() == [0, 2, 4, 1, 3, 5]


def test_a_fused_projection_is_query_key_value_in_this_order():
    c = config(nheads=2, group=2, head_dim=2, emb_dim=1)
    state = {f"layers.0.attn.{name}.weight": torch.full((rows, 1), value) for name, rows, value in
             [("query", 4, 1.0), ("key", 2, 2.0), ("value", 2, 3.0)]}  # fmt: skip
    held = written(FMS, state, c)
    (fused,) = held.tensors.values()
    assert held.keys() == ["base_model.layers.0.attn.in_proj.qkv_fused.weight"]
    assert fused.flatten().tolist() == [1, 1, 1, 1, 2, 2, 3, 3]


@st.composite
def slices_of_parts(draw) -> tuple[str, LLaMAConfig, str, tuple[slice, ...]]:
    """A table, sizes, one of its parameters and a slice of that."""
    nheads = draw(st.sampled_from([1, 2, 4, 6]))
    c = config(
        nheads=nheads,
        group=draw(st.sampled_from([n for n in (1, 2, 3) if nheads % n == 0])),
        head_dim=2 * draw(st.integers(1, 4)),
        emb_dim=draw(st.integers(1, 9)),
    )
    shapes = {name: shape for name, shape in shapes_of(c).items() if ".0." in name}
    name = draw(st.sampled_from(sorted(shapes)))

    def within(size: int) -> slice:
        first = draw(st.integers(0, size))
        return draw(st.sampled_from([slice(first, draw(st.integers(first, size))), slice(None), slice(first, None)]))

    return draw(st.sampled_from(sorted(TABLES))), c, name, tuple(within(size) for size in shapes[name])


@given(slices_of_parts())
def test_a_slice_of_a_part_is_the_slice_of_the_whole(case):
    source, c, name, index = case
    state = state_of(c)
    held = written(TABLES[source], state, c)
    part = match(TABLES[source], held.keys(), c)[0][name]
    got = part.read(held, index)
    assert got.shape == state[name][index].shape
    assert torch.equal(got, state[name][index])


def test_only_the_rows_that_are_needed_are_read():
    c = config(nheads=4, group=2, head_dim=6)
    held = written(FMS, state_of(c), c)
    parts, _ = match(FMS, held.keys(), c)
    for name, index, rows in [
        ("attn.value", slice(None), 12),
        ("attn.value", slice(3, 5), 2),
        ("attn.query", slice(6, 12), 6),  # one head
        ("attn.key", slice(0, 6), 6),
        ("ff.w1", slice(2, 4), 2),
        ("attn.key", slice(4, 4), 0),
    ]:
        held.rows = 0
        parts[f"layers.1.{name}.weight"].read(held, (index,))
        assert held.rows == rows, name


def test_rules_drop_and_leave_over():
    c = config()
    tensors = {
        "model.layers.12.self_attn.rotary_emb.inv_freq": torch.zeros(1),
        "model.layers.x.mlp.up_proj.weight": torch.zeros(1),
        "model.layers.3.mlp.up_proj.weight_scale": torch.zeros(1),
        "model.layers.3.mlp.up_proj.weight": torch.zeros(1),
        "prefix.model.norm.weight": torch.zeros(1),
    }
    parts, unknown = match(HF, tensors, c)
    assert parts == {"layers.3.ff.w1.weight": Part("model.layers.3.mlp.up_proj.weight")}
    assert unknown == [
        "model.layers.x.mlp.up_proj.weight",
        "model.layers.3.mlp.up_proj.weight_scale",
        "prefix.model.norm.weight",
    ]


def test_rows_may_be_left_out():
    rules: list[Rule] = [("table", "positions", lambda c: [slice(2, 5)])]
    held = Held({"table.weight": torch.arange(5.0)[:, None]})
    parts, _ = match(rules, held.keys(), None)
    assert parts["positions.weight"].shape(held) == (3, 1)
    assert parts["positions.weight"].read(held).flatten().tolist() == [2, 3, 4]


def test_one_parameter_from_two_keys_is_an_error():
    keys = ["base_model.layers.0.attn.in_proj.query.weight", "base_model.layers.0.attn.in_proj.qkv_fused.weight"]
    with pytest.raises(
        CheckpointError, match=r"layers\.0\.attn\.query\.weight is given twice, by .*query.* and by .*qkv"
    ):
        match(FMS, keys, config())


def test_what_a_format_has_no_place_for_is_an_error_that_lists_it():
    state = [entry("layers.0.attn.query.weight", torch.zeros(1)), entry("layers.0.gate.weight", torch.zeros(1))]
    with pytest.raises(CheckpointError, match=r"no place for layers\.0\.attn\.query\.weight, layers\.0\.gate\.weight"):
        entries([("mlp", "layers.*.ff")], state, config())


@pytest.fixture
def directory(tmp_path) -> Path:
    """A llama in the existing FMS's names, fused."""
    sizes = config(nheads=4, group=1, head_dim=4, emb_dim=8).as_dict()
    return save_model(get_model("llama", "micro", **sizes), tmp_path / "fms", "fms")


def load(directory: Path, strict: bool = True, **changes: object):
    sizes = config(nheads=4, group=1, head_dim=4, emb_dim=8).as_dict() | changes
    return get_model("llama", "micro", directory, strict=strict, **sizes)


def change(directory: Path, **changes: Tensor | None) -> None:
    reader = SafetensorsReader([directory / "model.safetensors"])
    tensors = {key: reader.read(key) for key in list(reader.keys())} | changes
    write_safetensors(directory, [entry(name, t) for name, t in tensors.items() if t is not None])


def test_one_error_lists_all_that_does_not_fit(directory):
    load(directory)
    change(
        directory,
        **{
            "base_model.dec_norm.weight": None,
            "base_model.layers.1.ln.weight": torch.ones(7),
            "base_model.layers.0.ff_sub_layer.w2.weight": torch.zeros(8, 15),
            "base_model.layers.7.ln.weight": torch.ones(8),
            "rubbish": torch.zeros(2),
        },
    )
    with pytest.raises(CheckpointError) as error:
        load(directory)
    lines = str(error.value).split("\n  ")
    assert lines[0] == f"{directory} does not fit the model:"
    assert sorted(lines[1:]) == [
        "base_model.layers.7.ln.weight: the model has no place for it",
        "dec_norm.weight: nothing in the checkpoint fills it",
        "layers.0.ff.w2.weight: base_model.layers.0.ff_sub_layer.w2.weight has shape [8, 15], the model wants [8, 14]",
        "layers.1.ln.weight: base_model.layers.1.ln.weight has shape [7], the model wants [8]",
        "rubbish: the model has no place for it",
    ]


def test_not_strict_leaves_out_what_is_too_much_or_too_little_but_no_shape(directory):
    whole = load(directory).state_dict()
    change(directory, **{"base_model.layers.1.ln.weight": None, "rubbish": torch.zeros(2)})
    state = load(directory, strict=False).state_dict()
    assert all(torch.equal(state[name], whole[name]) for name in whole if name != "layers.1.ln.weight")
    assert state["layers.1.ln.weight"].isfinite().all()
    change(directory, **{"head.weight": torch.zeros(12, 8)})
    with pytest.raises(
        CheckpointError, match=r"head.weight: head.weight has shape \[12, 8\], the model wants \[11, 8\]"
    ):
        load(directory, strict=False)


def test_a_long_list_of_faults_is_cut(directory):
    with pytest.raises(CheckpointError) as error:
        load(directory, nlayers=30)
    lines = str(error.value).split("\n  ")
    assert len(lines) == 22
    assert lines[-1].startswith("and ")


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kvheads": 2}, "qkv_fused.weight has 48 rows, the model wants 32"),
        ({"hidden_dim": 12}, "wg1_fused.weight has 28 rows, the model wants 24"),
    ],
)
def test_a_fused_tensor_with_rows_left_over_does_not_fit(directory, changes, message, strict):
    """Key and value would be read from rows of the query and the key."""
    with pytest.raises(CheckpointError, match=message):
        load(directory, strict, **changes)


def test_a_fused_tensor_with_too_few_rows_does_not_fit(directory):
    with pytest.raises(CheckpointError, match=r"wg1_fused.weight has 28 rows, the model wants 60"):
        load(directory, hidden_dim=30)


def test_a_part_of_a_fused_tensor_tells_the_shape_of_the_whole(directory):
    shape = r"qkv_fused.weight, of which it is a part, has shape \[48, 8\], the model wants \[16, 9\]"
    with pytest.raises(CheckpointError, match=f"layers.1.attn.key.weight: base_model.*{shape}"):
        load(directory, emb_dim=9)


def test_a_tied_pair_that_differs_is_an_error(tmp_path):
    sizes = config(nheads=4, group=1, head_dim=4, emb_dim=8).as_dict() | {"tie_heads": True}
    directory = save_model(get_model("llama", "micro", **sizes), tmp_path / "fms", "fms")
    load(directory, tie_heads=True)
    change(directory, **{"head.weight": torch.zeros(11, 8)})
    load(directory, tie_heads=False)
    for strict in (True, False):
        with pytest.raises(CheckpointError, match=r"head.weight is not base_model.embedding.weight.*\(tie_heads\)"):
            load(directory, strict, tie_heads=True)
