"""Checkpoint files are read exactly, in parts, by several threads; damaged and hostile ones are refused."""

import json
import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors.torch import save_file

from fms.utils.serialization import stored
from fms.utils.serialization.errors import CheckpointError
from fms.utils.serialization.readers import DTYPES, SafetensorsReader, open_reader

TENSORS = {
    "matrix": torch.randn(6, 10),
    "cube": torch.randn(3, 5, 4),
    "row": torch.randn(7),
    "scalar": torch.tensor(3.5),
    "nothing": torch.empty(0, 4),
    "half": torch.randn(4, 3).bfloat16(),
}


def saved(path, tensors=TENSORS, **kwargs):
    if path.suffix == ".safetensors":
        save_file(tensors, path, **kwargs)
    else:
        torch.save(tensors, path, **kwargs)
    return path


def raw(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


@pytest.fixture(params=["x.safetensors", "x.pth", "old.bin"])
def file(request, tmp_path):
    old = {"_use_new_zipfile_serialization": False} if request.param == "old.bin" else {}
    return saved(tmp_path / request.param, **old)


def test_every_tensor_comes_back(file):
    reader = open_reader(file)
    assert set(reader.keys()) == TENSORS.keys()
    for key, tensor in TENSORS.items():
        assert (reader.shape(key), reader.dtype(key)) == (tuple(tensor.shape), tensor.dtype)
        assert torch.equal(reader.read(key), tensor)


@pytest.mark.parametrize("chunk", [1, 24, 1 << 20])
def test_slices_equal_slicing_the_whole(file, chunk, monkeypatch):
    monkeypatch.setattr(stored, "CHUNK", chunk)
    reader = open_reader(file)
    cuts = [slice(None), slice(1, 3), slice(2, None), slice(3, 3), slice(-2, None), slice(1, 99)]
    for key in ("matrix", "cube", "row", "half"):
        for rows in cuts:
            for columns in cuts:
                index = (rows, columns)[: TENSORS[key].dim()]
                assert torch.equal(reader.read(key, index), TENSORS[key][index]), (key, index)
    index = (slice(0, 3), slice(1, 4), slice(2, 4))
    assert torch.equal(reader.read("cube", index), TENSORS["cube"][index])


def test_only_the_rows_asked_for_are_read(tmp_path, monkeypatch):
    reader = open_reader(saved(tmp_path / "x.safetensors"))
    counts = []
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda *args: counts.append(preadv(*args)) or counts[-1])
    reader.read("matrix", (slice(2, 4),))
    assert counts == [2 * 10 * 4]


def test_a_result_is_memory_of_its_own(file):
    reader = open_reader(file)
    reader.read("matrix").zero_()
    assert torch.equal(reader.read("matrix"), TENSORS["matrix"])


def test_threads_may_read_at_once(tmp_path):
    tensors = {str(i): torch.full((256, 64), float(i)) for i in range(40)}
    for name in ("x.safetensors", "x.pth"):
        reader = open_reader(saved(tmp_path / name, tensors))
        with ThreadPoolExecutor(8) as pool:
            for key, tensor in zip(list(tensors) * 5, pool.map(reader.read, list(tensors) * 5), strict=True):
                assert torch.equal(tensor, tensors[key])


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_every_dtype(dtype, tmp_path):
    tensor = torch.tensor([[0, 1, 1], [1, 0, 1]]).to(dtype)
    for name in ("x.safetensors", "x.pth"):
        reader = open_reader(saved(tmp_path / name, {"x": tensor}))
        assert reader.dtype("x") == dtype
        columns = reader.read("x", (slice(None), slice(0, 2)))
        assert torch.equal(columns.view(torch.uint8), tensor[:, :2].contiguous().view(torch.uint8))


def test_reading_is_the_same_under_a_default_device(file):
    with torch.device("meta"):
        assert torch.equal(open_reader(file).read("matrix", (slice(None), slice(1, 3))), TENSORS["matrix"][:, 1:3])


def test_wrong_requests(file):
    reader = open_reader(file)
    with pytest.raises(CheckpointError, match="did you mean 'matrix'"):
        reader.read("matrx")
    with pytest.raises(ValueError, match="step 1"):
        reader.read("matrix", (slice(None, None, 2),))
    with pytest.raises(ValueError, match="at most 1"):
        reader.read("row", (slice(None), slice(None)))


# safetensors


def test_metadata_and_several_files(tmp_path):
    a = saved(tmp_path / "a.safetensors", {"a": torch.ones(2)}, metadata={"format": "pt"})
    b = saved(tmp_path / "b.safetensors", {"b": torch.ones(3)}, metadata={"made": "here"})
    reader = SafetensorsReader([a, b])
    assert reader.metadata == {"format": "pt", "made": "here"}
    assert sorted(reader.keys()) == ["a", "b"]
    c = saved(tmp_path / "c.safetensors", {"b": torch.ones(3)})
    with pytest.raises(CheckpointError, match=r"c\.safetensors: b also in b\.safetensors"):
        SafetensorsReader([a, b, c])


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        ({"x": ENTRY}, 7, r"expected \d+ bytes by its header, the file has \d+"),
        ({"x": ENTRY}, 9, r"expected \d+ bytes by its header, the file has \d+"),
        ({"x": {**ENTRY, "shape": [3]}}, 8, r"'x', \[3\] of F32, takes 12 bytes; its offsets 0..8 give 8"),
        ({"x": {**ENTRY, "shape": [10**12]}}, 8, "takes 4000000000000 bytes"),
        ({"x": {**ENTRY, "shape": [-1, -2]}}, 8, "impossible shape"),
        ({"x": {**ENTRY, "shape": [1.0, 2]}}, 8, "impossible shape"),
        ({"x": {**ENTRY, "data_offsets": [-8, 0]}}, 8, "its offsets -8"),
        ({"x": {**ENTRY, "data_offsets": [8, 16]}}, 16, "overlap or gap"),
        ({"x": ENTRY, "y": ENTRY}, 8, "overlap or gap"),
        ({"x": {**ENTRY, "dtype": "F4"}}, 8, "dtype F4"),
        ({"x": {"dtype": "F32"}}, 8, "needs dtype, shape and data_offsets"),
        ({"x": ENTRY, "__metadata__": {"a": 1}}, 8, "names to strings"),
        (b'{"x": 1, "x": 2}', 0, "stands twice"),
        (b'{"x": ', 0, "broken JSON"),
        (b"\xff\xfe{}", 0, "broken JSON"),
        (b"[" * 100_000, 0, "broken JSON"),
        (b"[]", 0, "must be a JSON object"),
    ],
)
def test_damaged_safetensors(header, data, message, tmp_path):
    with pytest.raises(CheckpointError, match=message):
        open_reader(raw(tmp_path / "x.safetensors", header, bytes(data)))


@pytest.mark.parametrize("name", ["x.safetensors", "x.pth", "old.bin"])
def test_truncated_anywhere(name, tmp_path):
    """Faults 1 and 3: whatever is left of a file, the error is ours and names the file."""
    old = {"_use_new_zipfile_serialization": False} if name == "old.bin" else {}
    whole = saved(tmp_path / name, **old).read_bytes()
    cut = tmp_path / f"cut-{name}"
    for length in [*range(0, len(whole), max(1, len(whole) // 40)), len(whole) - 1]:
        cut.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"empty|truncated|damaged") as error:
            open_reader(cut)
        assert str(cut) in str(error.value)
        assert str(length) in str(error.value)


@pytest.mark.parametrize("name", ["x.safetensors", "x.pth", "x.bin"])
def test_files_that_are_something_else(name, tmp_path):
    file = tmp_path / name
    file.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(CheckpointError, match="git lfs pull"):
        open_reader(file)
    for start in (b"", b"\x80\x37", b"\x80\x02"):  # the latter two begin as pickles do
        file.write_bytes((start + os.urandom(1000))[:1000])
        with pytest.raises(CheckpointError, match="1000 bytes"):
            open_reader(file)


def test_a_file_cut_while_in_use(tmp_path):
    reader = open_reader(saved(tmp_path / "x.safetensors"))
    os.truncate(tmp_path / "x.safetensors", 900)
    with pytest.raises(CheckpointError, match="bytes missing at"):
        [reader.read(key) for key in TENSORS]


# directories


def sharded(directory, kind="safetensors", **weight_map):
    stem, index = ("model", "model.safetensors") if kind == "safetensors" else ("pytorch_model", "pytorch_model.bin")
    names = [f"{stem}-0000{i}-of-00002.{kind}" for i in (1, 2)]
    saved(directory / names[0], {"a": torch.ones(2), "b": torch.ones(3)})
    saved(directory / names[1], {"c": torch.ones(4)})
    where = {"a": names[0], "b": names[0], "c": names[1]} | weight_map
    (directory / f"{index}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return names


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_an_index_is_honoured(kind, tmp_path):
    sharded(tmp_path, kind)
    saved(tmp_path / f"other.{kind}", {"z": torch.ones(1)})
    reader = open_reader(tmp_path)
    assert sorted((key, reader.shape(key)) for key in reader.keys()) == [("a", (2,)), ("b", (3,)), ("c", (4,))]  # noqa: SIM118


@pytest.mark.parametrize(
    "name",
    [
        "../x.safetensors",
        "{root}/x.safetensors",
        "sub/x.safetensors",
        "..",
        "",
        ".",
        "link.safetensors",
        "a\0.safetensors",
        "x.pth",
    ],
)
def test_an_index_may_only_name_its_own_files(name, tmp_path):
    """Fault 8."""
    home = tmp_path / "home"
    (home / "sub").mkdir(parents=True)
    for target in (tmp_path / "x.safetensors", home / "sub/x.safetensors", home / "x.pth"):
        saved(target, {"evil": torch.ones(2)})
    (home / "link.safetensors").symlink_to(tmp_path / "x.safetensors")
    sharded(home, evil=name.format(root=tmp_path))
    with pytest.raises(CheckpointError, match=r"not a plain .* name inside the directory: refused"):
        open_reader(home)


def test_links_of_the_hub_cache(tmp_path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for i, name in enumerate(sharded(blobs)):
        (blobs / name).rename(blobs / str(i))
        (snapshot / name).symlink_to(f"../../blobs/{i}")
    (snapshot / "model.safetensors.index.json").symlink_to("../../blobs/model.safetensors.index.json")
    (tmp_path / "elsewhere").symlink_to(snapshot)
    for directory in (snapshot, tmp_path / "elsewhere"):
        assert sorted(open_reader(directory).keys()) == ["a", "b", "c"]


def test_every_problem_of_an_index_in_one_error(tmp_path):
    """Fault 9."""
    first, second = sharded(tmp_path, d="model-00009.safetensors", e="../x.safetensors")
    (tmp_path / second).write_bytes((tmp_path / second).read_bytes()[:-1])
    (tmp_path / "model.safetensors.index.json").write_text(
        (tmp_path / "model.safetensors.index.json").read_text().replace('"a"', '"a2"')
    )
    with pytest.raises(CheckpointError) as error:
        open_reader(tmp_path)
    for part in (
        "'../x.safetensors'",
        "model-00009.safetensors: no such file",
        f"{first}: lacks a2",
        f"{second}: expected",
    ):
        assert part in str(error.value)


@pytest.mark.parametrize("text", ["{", "", "[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": 1}}'])
def test_broken_indexes(text, tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"index\.json"):
        open_reader(tmp_path)


def test_missing_shards_without_an_index(tmp_path):
    first, _ = sharded(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    assert sorted(open_reader(tmp_path).keys()) == ["a", "b", "c"]
    (tmp_path / first).unlink()
    with pytest.raises(CheckpointError, match=r"missing: model-00001-of-00002\.safetensors"):
        open_reader(tmp_path)


def test_the_order_of_files_in_a_directory(tmp_path):
    expected = [
        "t.pt",
        "p.pth",
        "consolidated.00.pth",
        "a.bin",
        "pytorch_model.bin",
        "s.safetensors",
        "model.safetensors",
    ]
    unwanted = ["optimizer.pt", "scheduler.pt", "rng_state_0.pth", "training_args.bin", "consolidated.safetensors"]
    for name in [*unwanted[:4], *expected]:
        saved(tmp_path / name, {name: torch.ones(1)})
        if name in expected:
            assert list(open_reader(tmp_path).keys()) == [name]
        if name == "s.safetensors":
            saved(tmp_path / unwanted[4], {"mistral": torch.ones(1)})
            assert list(open_reader(tmp_path).keys()) == [name]
            (tmp_path / name).unlink()
            assert list(open_reader(tmp_path).keys()) == ["mistral"]


def test_nothing_to_open(tmp_path):
    saved(tmp_path / "training_args.bin", {"x": torch.ones(1)})
    with pytest.raises(CheckpointError, match=r"looked for model.safetensors.index.json.*there is training_args.bin"):
        open_reader(tmp_path)
    with pytest.raises(CheckpointError, match=r"no such file or directory \(did you mean 'training_args.bin'"):
        open_reader(tmp_path / "training_arg.bin")
    with pytest.raises(CheckpointError, match="not a kind of checkpoint"):
        open_reader(saved(tmp_path / "x.npz"))
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match=r"name one of a\.gguf, b\.gguf"):
        open_reader(tmp_path)


def test_paths_from_the_user(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    saved(tmp_path / "x.safetensors")
    assert open_reader("~/x.safetensors").files == [tmp_path / "x.safetensors"]
