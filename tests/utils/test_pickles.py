"""torch.save's files and Meta's shards are read exactly and in parts; nothing that a pickle carries is ever run."""

import json
import os
import pickle
import struct
import zipfile
from collections import OrderedDict

import pytest
import torch

from fms.utils.serialization.errors import CheckpointError
from fms.utils.serialization.pickles import MetaReader, PickleReader
from fms.utils.serialization.readers import open_reader

TENSORS = {"matrix": torch.randn(6, 10), "half": torch.randn(4, 3).bfloat16(), "scalar": torch.tensor(3.5)}


def saved(path, tensors=TENSORS, **kwargs):
    torch.save(tensors, path, **kwargs)
    return path


class Payload:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("name", ["x.pth", "x.bin", "x.pt"])
def test_code_in_a_pickle_is_never_run(name, zipped, tmp_path):
    state = {"weight": torch.ones(2), "extra": Payload(tmp_path / "ran")}
    torch.save(state, tmp_path / name, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=r"posix.mkdir, which is code") as error:
        open_reader(tmp_path / name)
    assert "weights_only" not in str(error.value)
    assert error.value.__context__ is None
    assert not (tmp_path / "ran").exists()


def test_a_bare_pickle_with_code_is_never_run(tmp_path):
    (tmp_path / "x.bin").write_bytes(pickle.dumps(Payload(tmp_path / "ran"), protocol=2))
    with pytest.raises(CheckpointError) as error:
        open_reader(tmp_path / "x.bin")
    assert "weights_only" not in str(error.value)
    assert not (tmp_path / "ran").exists()


def rezipped(source, target, compression=zipfile.ZIP_STORED, rename=lambda name: name):
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", compression) as new:
        for info in old.infolist():
            new.writestr(rename(info.filename), old.read(info))
    return target


def test_zip_bomb(tmp_path):
    saved(tmp_path / "x.pth", {"x": torch.zeros(1 << 20)})
    bomb = rezipped(tmp_path / "x.pth", tmp_path / "bomb.pth", zipfile.ZIP_DEFLATED)
    assert bomb.stat().st_size < 20_000
    with pytest.raises(CheckpointError, match=r"is compressed, \d+ bytes for \d+: refused"):
        open_reader(bomb)


def test_zip_that_claims_more_than_it_has(tmp_path):
    file = saved(tmp_path / "x.pth", {"x": torch.zeros(1000)})
    content = bytearray(file.read_bytes())
    at = content.rindex(b"x/data/0") - 46  # the entry in the directory at the end
    content[at + 20 : at + 28] = struct.pack("<II", 10**9, 10**9)
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"claims 10\d+ bytes of content, the file has \d+"):
        open_reader(file)


def test_zip_names_that_leave_it(tmp_path):
    saved(tmp_path / "x.pth")
    for name in ("../evil", "/evil", "a\\evil"):
        evil = rezipped(
            tmp_path / "x.pth", tmp_path / "evil.pth", rename=lambda old, name=name: old.replace("x/version", name)
        )
        with pytest.raises(CheckpointError, match="entry named"):
            open_reader(evil)


def test_other_byte_order(tmp_path):
    file = saved(tmp_path / "x.pth", {"x": torch.zeros(10)})
    file.write_bytes(file.read_bytes().replace(b"little", b"big\0\0\0"))
    with pytest.raises(CheckpointError, match="this machine's is 'little'"):
        open_reader(file)


def test_a_record_of_another_size(tmp_path):
    saved(tmp_path / "x.pth", {"x": torch.zeros(1000)})
    with zipfile.ZipFile(tmp_path / "x.pth") as old, zipfile.ZipFile(tmp_path / "y.pth", "w") as new:
        for info in old.infolist():
            new.writestr(info.filename, bytes(40) if info.filename.endswith("data/0") else old.read(info))
    with pytest.raises(CheckpointError, match=r"'x' claims 4000 bytes at .* record of 40"):
        open_reader(tmp_path / "y.pth")


@pytest.mark.parametrize("zipped", [True, False])
def test_a_tensor_claiming_more_than_its_storage(zipped, tmp_path):
    """Fault 7: its shape can be compared, it can't be read."""
    huge = {"x": torch.zeros(1).expand(10**6, 10**6), "ok": torch.ones(2)}
    reader = PickleReader([saved(tmp_path / "x.pth", huge, _use_new_zipfile_serialization=zipped)])
    assert reader.shape("x") == (10**6, 10**6)
    for index in ((), (slice(0, 1), slice(0, 1))):
        with pytest.raises(CheckpointError, match=r"claims the shape .* 4000000000000 bytes, but the file has only 4"):
            reader.read("x", index)
    assert torch.equal(reader.read("ok"), torch.ones(2))


def test_views_transposes_parameters_and_ties(tmp_path):
    base = torch.randn(8, 6)
    state = {"view": base[2:5], "t": base.t(), "odd": base[:, 1:3], "p": torch.nn.Parameter(base[0]), "tied": base}
    reader = open_reader(saved(tmp_path / "x.pth", state))
    for key, tensor in state.items():
        assert torch.equal(reader.read(key), tensor)
        assert torch.equal(reader.read(key, (slice(1, 3),)), tensor[1:3])
    assert torch.equal(reader.read("t", (slice(None), slice(3, 7))), base.t()[:, 3:7])


@pytest.mark.parametrize("wrapper", ["model", "state_dict", "model_state"])
def test_wrapped_state_dicts(wrapper, tmp_path):
    file = saved(tmp_path / "x.pth", {"step": 7, wrapper: {"w": torch.ones(2), "note": "no tensor"}})
    assert list(open_reader(file).keys()) == ["w"]


@pytest.mark.parametrize("content", [{"step": 7}, [torch.ones(2)], torch.ones(2), {1: torch.ones(2)}])
def test_no_state_dict(content, tmp_path):
    with pytest.raises(CheckpointError, match=r"x\.pth"):
        open_reader(saved(tmp_path / "x.pth", content))


class Lie:
    """Unpickled as a tensor of a shape that its storage of four floats can't have."""

    def __init__(self, *view):
        self.view = view

    def __reduce__(self):
        storage = torch.arange(4.0)._typed_storage()
        return torch._utils._rebuild_tensor_v2, (storage, *self.view, False, OrderedDict())


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("view", [(0, (100,), (1,)), (0, (2, 2), (100, 1)), (3, (2,), (1,)), (-1, (2,), (1,))])
def test_a_view_beyond_its_storage(view, zipped, tmp_path):
    state = {"x": Lie(*view), "other": torch.ones(300)}
    file = saved(tmp_path / "x.pth", state, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=r"x\.pth"):
        open_reader(file)


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
def test_sparse_tensors_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="'x' must be"):
        open_reader(saved(tmp_path / "x.pth", {"x": torch.eye(3).to_sparse()}))


# Meta's shards


META = {
    "tok_embeddings.weight": torch.randn(12, 8),
    "layers.0.attention.wq.weight": torch.randn(8, 8),
    "layers.0.attention.wo.weight": torch.randn(8, 8),
    "layers.0.feed_forward.w1.weight": torch.randn(16, 8),
    "layers.0.feed_forward.w2.weight": torch.randn(8, 16),
    "layers.0.ffn_norm.weight": torch.randn(8),
    "norm.weight": torch.randn(8),
    "output.weight": torch.randn(12, 8),
}


def meta_shards(directory, count, embedding_dim, params=True, **replaced):
    def shard(key, rank):
        name = key.split(".")[-2]
        dim = {"tok_embeddings": embedding_dim, "wo": 1, "w2": 1}.get(name, None if "norm" in name else 0)
        return META[key] if dim is None else META[key].chunk(count, dim)[rank].clone()

    for rank in range(count):
        state = {key: shard(key, rank) for key in META} | {"rope.freqs": torch.ones(2)}
        saved(directory / f"consolidated.{rank:02}.pth", state | (replaced if rank == count - 1 else {}))
    if params:
        (directory / "params.json").write_text(json.dumps({"dim": 8}))
    return directory


@pytest.mark.parametrize(("count", "embedding_dim"), [(1, 0), (2, 0), (2, 1), (4, 0), (4, 1)])
def test_meta_shards_are_merged(count, embedding_dim, tmp_path):
    reader = open_reader(meta_shards(tmp_path, count, embedding_dim))
    assert list(reader.keys()) == list(META)
    for key, tensor in META.items():
        assert reader.shape(key) == tuple(tensor.shape)
        assert torch.equal(reader.read(key), tensor)
        for index in [(slice(1, 7),), (slice(None), slice(3, 6)), (slice(3, 5), slice(5, 8))]:
            index = index[: tensor.dim()]
            assert torch.equal(reader.read(key, index), tensor[index])


def test_a_slice_touches_only_its_shards(tmp_path):
    reader = open_reader(meta_shards(tmp_path, 4, 1))
    for rank in (0, 1, 3):
        (tmp_path / f"consolidated.{rank:02}.pth").unlink()
    for key, index in [
        ("output.weight", (slice(6, 9),)),
        ("layers.0.feed_forward.w2.weight", (slice(None), slice(8, 12))),
    ]:
        assert torch.equal(reader.read(key, index), META[key][index])


def test_meta_shards_that_do_not_fit(tmp_path):
    files = sorted(meta_shards(tmp_path, 2, 0, params=False).glob("*.pth"))
    with pytest.raises(CheckpointError, match=r"params\.json: no such file"):
        open_reader(tmp_path)
    with pytest.raises(CheckpointError, match=r"'tok_embeddings.weight', \(6, 8\) each, with the dim 99"):
        MetaReader(files, 99)
    (tmp_path / "params.json").write_text("{}")
    with pytest.raises(CheckpointError, match="whole number as dim"):
        open_reader(tmp_path)
    files[0].rename(tmp_path / "consolidated.02.pth")
    with pytest.raises(CheckpointError, match=r"expected the shards consolidated\.00\.pth, consolidated\.01\.pth"):
        MetaReader(tmp_path.glob("*.pth"), 8)


@pytest.mark.parametrize(
    ("replaced", "message"),
    [
        ({"unheard.of.weight": torch.ones(3)}, "unheard.of.weight not in it and in"),
        ({"output.weight": torch.ones(6, 7)}, "does not go with"),
        ({"output.weight": torch.ones(6, 8).half()}, "does not go with"),
    ],
)
def test_meta_shards_that_contradict(replaced, message, tmp_path):
    with pytest.raises(CheckpointError, match=message):
        open_reader(meta_shards(tmp_path, 2, 0, **replaced))


def test_repeated_tensors_must_agree(tmp_path):
    reader = open_reader(meta_shards(tmp_path, 2, 0, **{"norm.weight": torch.ones(8)}))
    with pytest.raises(CheckpointError, match="what every shard repeats differs"):
        reader.read("norm.weight")
