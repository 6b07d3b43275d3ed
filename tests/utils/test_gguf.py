"""The GGUF reader against the `gguf` package, in slices, and on files that are not what they claim."""

import os
import re
import struct
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from hypothesis import given, settings
from hypothesis import strategies as st

from fms.utils.serialization import gguf as reader_module
from fms.utils.serialization.errors import CheckpointError
from fms.utils.serialization.gguf import GGUFReader

TYPES = [Type.F32, Type.F16, Type.BF16, Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1, Type.Q8_0]
K_TYPES = {Type.Q4_K: (0, 2), Type.Q5_K: (0, 2), Type.Q6_K: (208,)}  # where a block's fp16 factors are
DTYPES = {Type.F16: torch.float16, Type.BF16: torch.bfloat16}


def stored(kind: Type, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Random values as the bytes of `kind`: quantised, or random blocks with sound factors where gguf cannot do it."""
    rng = np.random.default_rng(seed)
    if kind not in K_TYPES:
        return gguf.quants.quantize(rng.standard_normal(shape, np.float32), kind)
    data = rng.integers(0, 256, gguf.quant_shape_to_byte_shape(shape, kind), np.uint8)
    blocks = data.reshape(-1, gguf.GGML_QUANT_SIZES[kind][1])
    for at in K_TYPES[kind]:
        blocks[:, at : at + 2] = rng.standard_normal((len(blocks), 1)).astype(np.float16).view(np.uint8)
    return data


def write(path: Path, tensors: dict[str, tuple[Type, np.ndarray]], metadata: dict | None = None, **options) -> Path:
    writer = gguf.GGUFWriter(path, "llama", **options)
    for key, (value, *kinds) in (metadata or {}).items():
        writer.add_key_value(key, value, *kinds)
    for name, (kind, data) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def same(ours: torch.Tensor, theirs: np.ndarray) -> bool:
    return ours.shape == theirs.shape and np.array_equal(ours.float().numpy().view(np.int32), theirs.view(np.int32))


@pytest.fixture(scope="module")
def tensors() -> dict[str, tuple[Type, np.ndarray]]:
    shapes = {"vector": (512,), "matrix": (7, 512), "experts": (3, 5, 256), "four": (2, 3, 2, 256)}
    return {
        f"{kind.name}.{name}": (kind, stored(kind, shape, seed))
        for kind in [*TYPES, *K_TYPES]
        for seed, (name, shape) in enumerate(shapes.items())
    }


@pytest.fixture(scope="module")
def file(tmp_path_factory, tensors) -> Path:
    return write(tmp_path_factory.mktemp("gguf") / "all.gguf", tensors)


def test_every_type_equals_gguf_bit_for_bit(file, tensors):
    reader = GGUFReader(file)
    assert reader.files == [file]
    assert reader.keys() == list(tensors)
    for key, (kind, data) in tensors.items():
        expected = gguf.quants.dequantize(data, kind)
        value = reader.read(key)
        assert same(value, expected), key
        assert reader.shape(key) == expected.shape
        assert value.dtype == reader.dtype(key) == DTYPES.get(kind, torch.float32)
        assert reader.tensor_type(key) == kind.name


@st.composite
def selections(draw) -> tuple[str, tuple[slice, ...]]:
    kind = draw(st.sampled_from([*TYPES, *K_TYPES]))
    name, rank = draw(st.sampled_from([("vector", 1), ("matrix", 2), ("experts", 3), ("four", 4)]))
    ends = st.none() | st.integers(-3, 8) | st.integers(-520, 520)
    return f"{kind.name}.{name}", tuple(draw(st.lists(st.builds(slice, ends, ends), max_size=rank)))


@pytest.mark.parametrize("chunk", [600, 1 << 18])  # values at a time: a row or two, everything
def test_a_slice_is_that_slice_of_the_whole(file, monkeypatch, chunk):
    monkeypatch.setattr(reader_module, "_CHUNK", chunk)
    reader = GGUFReader(file)
    whole = {key: reader.read(key) for key in reader.keys()}  # noqa: SIM118

    @settings(max_examples=300)
    @given(selections())
    def check(selection):
        key, index = selection
        part = reader.read(key, index)
        assert torch.equal(part, whole[key][index])
        assert part.is_contiguous()
        assert part.untyped_storage().nbytes() == part.nbytes

    check()


@pytest.mark.parametrize("index", [(slice(0, 4, 2),), (slice(None),) * 3])
def test_an_index_that_is_no_plain_slice_is_refused(file, index):
    with pytest.raises(ValueError, match=r"'F32.matrix' of shape \[7, 512\]: at most one slice of step 1 a dimension"):
        GGUFReader(file).read("F32.matrix", index)


def test_an_unknown_key_names_the_nearest(file):
    with pytest.raises(CheckpointError, match=r"all.gguf: no tensor 'Q8_0.matrx' \(did you mean 'Q8_0.matrix'\?\)"):
        GGUFReader(file).read("Q8_0.matrx")


def test_only_the_rows_asked_for_are_read(file, monkeypatch):
    reader, sizes, preadv = GGUFReader(file), [], os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, at: sizes.append(len(buffers[0])) or preadv(fd, buffers, at))
    reader.read("Q4_1.matrix", (slice(2, 5), slice(32, 64)))
    reader.read("F32.experts", (slice(1, 2), slice(1, 3)))
    assert sizes == [3 * 512 // 32 * 20, 2 * 256 * 4]


def test_a_large_tensor_is_dequantised_in_small_pieces(tmp_path, monkeypatch):
    rows = stored(Type.Q4_1, (64, 4096))
    path = write(tmp_path / "large.gguf", {"w": (Type.Q4_1, np.tile(rows, (16, 1)))})
    kind, sizes = reader_module._TYPES[Type.Q4_1], []
    watched = kind._replace(dequantise=lambda blocks, out: sizes.append(out.nbytes) or kind.dequantise(blocks, out))
    monkeypatch.setitem(reader_module._TYPES, Type.Q4_1, watched)
    value = GGUFReader(path).read("w")
    assert sum(sizes) == value.nbytes == 1024 * 4096 * 4
    assert max(sizes) <= 1 << 20
    assert same(value[-64:], gguf.quants.dequantize(rows, Type.Q4_1))


def test_infinite_factors_come_through_without_a_warning(tmp_path):
    data = {kind: stored(kind, (2, 256)) for kind in [Type.Q4_1, Type.Q8_0, *K_TYPES]}
    for kind, content in data.items():
        content[0, K_TYPES.get(kind, (0,))[0] :][:2] = np.array([np.inf], np.float16).view(np.uint8)
    reader = GGUFReader(write(tmp_path / "inf.gguf", {kind.name: (kind, content) for kind, content in data.items()}))
    for key in reader.keys():  # noqa: SIM118
        value = reader.read(key)
        assert not value[0].isfinite().all()
        assert value[1].isfinite().all()


def test_another_default_device_is_no_matter(file):
    reader = GGUFReader(file)
    with torch.device("meta"):
        values = {key: reader.read(key) for key in reader.keys()}  # noqa: SIM118
    assert all(torch.equal(value, reader.read(key)) for key, value in values.items())


def test_threads_may_read_at_once(file):
    reader = GGUFReader(file)
    keys = reader.keys() * 4
    with ThreadPoolExecutor(4) as pool:
        for key, value in zip(keys, pool.map(reader.read, keys), strict=True):
            assert torch.equal(value, reader.read(key))


METADATA = {
    "u8": (200, gguf.GGUFValueType.UINT8),
    "i8": (-3, gguf.GGUFValueType.INT8),
    "u16": (60000, gguf.GGUFValueType.UINT16),
    "i16": (-30000, gguf.GGUFValueType.INT16),
    "u32": (1 << 31, gguf.GGUFValueType.UINT32),
    "i32": (-5, gguf.GGUFValueType.INT32),
    "u64": (1 << 63, gguf.GGUFValueType.UINT64),
    "i64": (-(1 << 40), gguf.GGUFValueType.INT64),
    "f32": (0.5, gguf.GGUFValueType.FLOAT32),
    "f64": (0.1, gguf.GGUFValueType.FLOAT64),
    "yes": (True, gguf.GGUFValueType.BOOL),
    "no": (False, gguf.GGUFValueType.BOOL),
    "text": ("größe 🙂", gguf.GGUFValueType.STRING),
    "tokens": (["a", "", "▁the", "🙂"], gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.STRING),
    "ids": ([1, -2, 3], gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.INT32),
    "scores": ([0.5, -1.5], gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.FLOAT32),
    "flags": ([True, False], gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.BOOL),
}


def test_metadata_is_plain_python(tmp_path):
    found = GGUFReader(write(tmp_path / "m.gguf", {}, METADATA)).metadata
    expected = {"general.architecture": "llama"} | {key: value for key, (value, *_) in METADATA.items()}
    assert found == expected
    assert {key: type(value) for key, value in found.items()} == {key: type(value) for key, value in expected.items()}
    assert all(type(flag) is bool for flag in found["flags"])


def test_the_real_model_equals_gguf(smollm2):
    reader, theirs = GGUFReader(smollm2), gguf.GGUFReader(smollm2)
    assert len(reader.metadata["tokenizer.ggml.tokens"]) == reader.metadata["llama.vocab_size"] == 49152
    assert reader.keys() == [tensor.name for tensor in theirs.tensors]
    for tensor in theirs.tensors[:10]:
        rows = slice(0, 1000)
        expected = gguf.quants.dequantize(np.array(tensor.data[rows]), tensor.tensor_type)
        assert reader.tensor_type(tensor.name) == tensor.tensor_type.name
        assert same(reader.read(tensor.name, (rows,)), expected), tensor.name


def test_a_large_vocabulary_is_parsed_at_once(tmp_path):
    tokens = [f"token {i}" for i in range(200_000)]  # more than one read of the header
    kinds = gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.STRING
    path = write(tmp_path / "v.gguf", {"w": (Type.F32, stored(Type.F32, (2, 2)))}, {"tokens": (tokens, *kinds)})
    start = time.perf_counter()
    reader = GGUFReader(path)
    assert time.perf_counter() - start < 1  # 0.1 s on two idle cores
    assert reader.metadata["tokens"] == tokens
    assert same(reader.read("w"), stored(Type.F32, (2, 2)))


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def entry(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def info(name: str, shape: tuple[int, ...] = (4,), kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def header(entries: list[bytes], infos: list[bytes], version: int = 3) -> bytes:
    """A file's bytes up to the data, which is 64 bytes."""
    head = struct.pack("<4sIQQ", b"GGUF", version, len(infos), len(entries)) + b"".join(entries + infos)
    return head + bytes(-len(head) % 32) + bytes(64)


GOOD = header([entry("a", 4, b"\1\0\0\0")], [info("w"), info("v", (2, 2), 0, 32)])
COUNT = struct.pack("<Q", 10**12)
BROKEN = {
    "empty": (b"", "truncated or damaged: the magic number must reach to byte 4, the file has 0"),
    "magic": (b"GGML" + GOOD[4:], "not a GGUF file: it must begin with b'GGUF', found b'GGML'"),
    "version 1": (header([], [], 1), "GGUF version 1; 2 or 3 is required"),
    "version 4": (header([], [], 4), "GGUF version 4; 2 or 3 is required"),
    "short head": (GOOD[:20], "the counts of tensors and metadata must reach to byte 24, the file has 20"),
    "tensors": (GOOD[:8] + COUNT + GOOD[16:], "claims 1000000000000 tensors, at most 16777216 are believed"),
    "more tensors": (GOOD[:8] + struct.pack("<Q", 99) + GOOD[16:], "99 tensors must reach to byte"),
    "entries": (GOOD[:16] + COUNT + GOOD[24:], "claims 1000000000000 metadata entries"),
    "more entries": (GOOD[:16] + struct.pack("<Q", 999) + GOOD[24:], "999 metadata entries must reach to byte"),
    "string": (
        header([struct.pack("<Q", 1 << 60)], []),
        f"a metadata key must reach to byte {(1 << 60) + 32}, the file has",
    ),
    "array": (header([entry("a", 9, struct.pack("<I", 4) + COUNT)], []), "claims 1000000000000 items of metadata 'a'"),
    "more items": (
        header([entry("a", 9, struct.pack("<IQ", 8, 99))], []),
        "99 items of metadata 'a' must reach to byte",
    ),
    "nested": (
        header([entry("a", 9, struct.pack("<IQ", 9, 1))], []),
        "metadata 'a' has value type 9; 0 to 12 are known",
    ),
    "value type": (header([entry("a", 13, bytes(8))], []), "metadata 'a' has value type 13; 0 to 12 are known"),
    "not text": (header([entry("a", 8, struct.pack("<Q", 1) + b"\xff")], []), r"is not UTF-8: b'\xff'"),
    "same key": (header([entry("a", 0, b"1")] * 2, []), "metadata 'a' is there twice"),
    "alignment": (header([entry("general.alignment", 4, b"\3\0\0\0")], []), "general.alignment is 3, a power of two"),
    "alignment 0": (header([entry("general.alignment", 4, bytes(4))], []), "general.alignment is 0, a power of two"),
    "alignment text": (
        header([entry("general.alignment", 8, text("32"))], []),
        "general.alignment is '32', a power of two",
    ),
    "split": (header([entry("split.count", 9, struct.pack("<IQ", 0, 0))], []), "split.count is [], a whole number"),
    "same name": (header([], [info("w"), info("w", offset=32)]), "tensor 'w' is there twice"),
    "rank": (header([], [info("w", (1,) * 5)]), "tensor 'w' has 5 dimensions, at most 4 are possible"),
    "no size": (header([], [info("w", (4, 0))]), "tensor 'w' of shape [0, 4] and type F32: sizes must be positive"),
    "block": (
        header([], [info("w", (48,), 3)]),
        "of shape [48] and type Q4_1: sizes must be positive and the last a multiple of 32",
    ),
    "type": (
        header([], [info("w", (256,), 23)]),
        "tensor 'w' is of type IQ4_XS (23); supported are F32, F16, BF16, Q4_0,",
    ),
    "other type": (header([], [info("w", kind=77)]), "tensor 'w' is of type number (77); supported are F32, F16,"),
    "offset": (header([], [info("w", offset=16)]), "begins at 16, required is a multiple of 32"),
    "overlap": (
        header([], [info("w", (9,)), info("v", (1,), 0, 32)]),
        "tensor 'w' ends at byte 132, 'v' begins at 128",
    ),
    "beyond": (header([], [info("w", offset=64)]), "takes bytes 128 to 144, the file has 128"),
    "far beyond": (header([], [info("w", offset=1 << 62)]), f"takes bytes {(1 << 62) + 64} to"),
    "large": (
        header([], [info("w", (1 << 40, 1 << 40))]),
        "of shape [1099511627776, 1099511627776] and type F32 takes bytes 96",
    ),
    "short data": (GOOD[:-17], f"takes bytes {len(GOOD) - 32} to {len(GOOD) - 16}, the file has {len(GOOD) - 17}"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_file_says_what_is_wrong(tmp_path, fault):
    content, message = BROKEN[fault]
    path = tmp_path / "broken.gguf"
    path.write_bytes(content)
    tracemalloc.start()
    with pytest.raises(CheckpointError, match=re.escape(f"{path}: ") + ".*" + re.escape(message)):
        GGUFReader(path)
    assert tracemalloc.get_traced_memory()[1] < 4 << 20
    tracemalloc.stop()


def test_a_missing_file_and_a_directory_are_checkpoint_errors(tmp_path):
    with pytest.raises(CheckpointError, match=r"none.gguf: cannot be read: No such file or directory"):
        GGUFReader(tmp_path / "none.gguf")
    with pytest.raises(CheckpointError, match="cannot be read: Is a directory"):
        GGUFReader(tmp_path)


def test_big_endian_is_refused(tmp_path):
    path = write(tmp_path / "big.gguf", {"w": (Type.F32, stored(Type.F32, (2, 2)))}, endianess=gguf.GGUFEndian.BIG)
    with pytest.raises(CheckpointError, match="a big-endian GGUF file; little-endian is required"):
        GGUFReader(path)


def test_version_2_and_another_alignment(tmp_path):
    path = tmp_path / "v2.gguf"
    body = entry("general.alignment", 4, struct.pack("<I", 256)), info("w", (2, 2)) + info("v", (2, 2), 0, 256)
    head = struct.pack("<4sIQQ", b"GGUF", 2, 2, 1) + b"".join(body)
    path.write_bytes(
        head.ljust(256, b"x") + struct.pack("<4f", 1, 2, 3, 4).ljust(256, b"x") + struct.pack("<4f", 5, 6, 7, 8)
    )
    reader = GGUFReader(path)
    assert reader.read("w").tolist() == [[1, 2], [3, 4]]
    assert reader.read("v").tolist() == [[5, 6], [7, 8]]


def test_a_file_cut_after_opening_is_an_error(tmp_path):
    path = write(tmp_path / "cut.gguf", {"w": (Type.Q8_0, stored(Type.Q8_0, (64, 64)))})
    reader = GGUFReader(path)
    os.truncate(path, path.stat().st_size - 100)
    with pytest.raises(CheckpointError, match=r"cut.gguf: cut short since it was opened: expected \d+ bytes"):
        reader.read("w")


def open_and_read(path: Path) -> None:
    """What a damaged file may do: open and read, or say that it is damaged."""
    try:
        reader = GGUFReader(path)
    except CheckpointError:
        return
    for key in reader.keys():  # noqa: SIM118
        assert reader.read(key).shape == reader.shape(key)


@pytest.fixture(scope="module")
def sample(tmp_path_factory) -> bytes:
    tensors = {f"blk.{i}.w": (kind, stored(kind, (2, 256))) for i, kind in enumerate([*TYPES, *K_TYPES])}
    return write(tmp_path_factory.mktemp("sample") / "s.gguf", tensors, METADATA).read_bytes()


def test_no_truncation_raises_anything_else(sample, tmp_path):
    path = tmp_path / "t.gguf"
    whole = sample.rstrip(b"\0")
    for size in [*range(300), *range(300, len(whole), 13)]:
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=r"t\.gguf: truncated"):
            GGUFReader(path)


def test_no_flipped_bit_raises_anything_else(sample, tmp_path):
    path = tmp_path / "f.gguf"

    @settings(max_examples=800)
    @given(st.lists(st.integers(0, 8 * 2000 - 1), min_size=1, max_size=4))
    def check(bits):
        damaged = bytearray(sample)
        for bit in bits:
            damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        open_and_read(path)

    check()


@pytest.fixture
def parts(tmp_path) -> list[Path]:
    """A model of four tensors in two parts, as llama.cpp splits it."""
    found = []
    for number in range(2):
        split = {"split.no": number, "split.count": 2, "split.tensors.count": 4}
        metadata = {key: (value, gguf.GGUFValueType.UINT16) for key, value in split.items()}
        if number == 0:
            metadata["text"] = "hello", gguf.GGUFValueType.STRING
        tensors = {f"{number}.{i}": (Type.F32, stored(Type.F32, (2, 2), 2 * number + i)) for i in range(2)}
        found.append(write(tmp_path / f"m-{number + 1:05}-of-00002.gguf", tensors, metadata))
    return found


@pytest.mark.parametrize("opened", [0, 1])
def test_a_split_model_is_one(parts, opened):
    reader = GGUFReader(parts[opened])
    assert reader.files == parts
    assert reader.metadata["text"] == "hello"
    assert reader.keys() == ["0.0", "0.1", "1.0", "1.1"]
    assert same(reader.read("1.0"), stored(Type.F32, (2, 2), 2))


def test_a_split_model_without_a_part(parts):
    parts[1].unlink()
    with pytest.raises(CheckpointError, match=r"1 of 2 parts are missing: m-00002-of-00002.gguf"):
        GGUFReader(parts[0])


def test_a_split_model_with_the_wrong_parts(parts):
    first, second = (part.read_bytes() for part in parts)
    parts[1].write_bytes(first)
    with pytest.raises(
        CheckpointError, match=r"00002-of-00002.gguf: split.no and split.count must be \(1, 2\), found \(0, 2\)"
    ):
        GGUFReader(parts[0])
    parts[1].write_bytes(second.replace(b"1.0", b"0.0"))
    with pytest.raises(CheckpointError, match=r"00002-of-00002.gguf: has tensors that an earlier part has: 0.0"):
        GGUFReader(parts[0])
    renamed = parts[0].rename(parts[0].with_name("model.gguf"))
    with pytest.raises(
        CheckpointError, match=r"one of 2 parts \(split.count\), so its name must end in -NNNNN-of-00002.gguf"
    ):
        GGUFReader(renamed)


def test_a_split_model_with_too_few_tensors(parts):
    content = parts[0].read_bytes()
    at = content.index(b"split.tensors.count") + len(b"split.tensors.count") + 4
    parts[0].write_bytes(content[:at] + b"\5" + content[at + 1 :])
    with pytest.raises(CheckpointError, match=r"split.tensors.count is 5, the parts have 4 tensors"):
        GGUFReader(parts[0])
