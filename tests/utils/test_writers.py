"""What is written is read back the same by us and by others, appears whole or not at all, and tells its damage."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import weakref

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from fms.utils.serialization import writers
from fms.utils.serialization.readers import DTYPES, open_reader
from fms.utils.serialization.writers import (
    Entry,
    verify_manifest,
    write_manifest,
    write_pickle,
    write_safetensors,
    writing,
)

TENSORS = {
    "flags": torch.tensor([True, False, True]),
    "matrix": torch.randn(6, 10),
    "transposed": torch.randn(5, 7).t(),
    "columns": torch.randn(8, 8)[:, 2:5],
    "scalar": torch.tensor(2.5),
    "nothing": torch.empty(0, 3),
    "half": torch.randn(3, 3).bfloat16(),
    "parameter": torch.nn.Parameter(torch.ones(2)),
}


def entries(tensors=TENSORS):
    return [Entry(name, tuple(t.shape), t.dtype, lambda t=t: t) for name, t in tensors.items()]


@pytest.mark.parametrize("chunk", [1, 40, 1 << 20])
def test_one_file(chunk, tmp_path, monkeypatch):
    monkeypatch.setattr(writers, "CHUNK", chunk)
    assert write_safetensors(tmp_path, entries(), {"made": "here"}) == [tmp_path / "model.safetensors"]
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "made": "here"}
        assert set(file.keys()) == TENSORS.keys()
        for name, tensor in TENSORS.items():
            assert torch.equal(file.get_tensor(name), tensor), name
    reader = open_reader(tmp_path)
    for name, tensor in TENSORS.items():
        assert reader.dtype(name) == tensor.dtype
        assert torch.equal(reader.read(name), tensor), name


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_every_dtype(dtype, tmp_path):
    tensor = torch.tensor([[0, 1, 1], [1, 0, 1]]).to(dtype)
    write_safetensors(tmp_path, entries({"x": tensor}))
    loaded = load_file(tmp_path / "model.safetensors")["x"]
    assert loaded.dtype == dtype
    assert torch.equal(loaded.view(torch.uint8), tensor.view(torch.uint8))


def test_data_is_aligned(tmp_path):
    write_safetensors(tmp_path, entries())
    for stored in open_reader(tmp_path)._tensors.values():
        assert stored.offset % stored.dtype.itemsize == 0


def test_shards_and_their_index(tmp_path):
    tensors = {f"t{i}": torch.full((100,), float(i)) for i in range(5)} | {
        "big": torch.ones(400),
        "last": torch.ones(1),
    }
    files = write_safetensors(tmp_path, entries(tensors), max_shard_bytes=800)
    names = [f"model-0000{i}-of-00005.safetensors" for i in range(1, 6)]
    assert [file.name for file in files] == [*names, "model.safetensors.index.json"]
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(file.name for file in files)
    index = json.loads(files[-1].read_text())
    assert index["metadata"] == {"total_size": 5 * 400 + 1600 + 4}
    held = [["t0", "t1"], ["t2", "t3"], ["t4"], ["big"], ["last"]]
    assert index["weight_map"] == {key: name for name, keys in zip(names, held, strict=True) for key in keys}
    reader = open_reader(tmp_path)
    assert all(torch.equal(reader.read(name), tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("max_shard_bytes", [5 * 2**30, 20_000])
def test_transformers_loads_it(max_shard_bytes, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    model = LlamaForCausalLM(config)
    config.save_pretrained(tmp_path)
    write_safetensors(tmp_path, entries(model.state_dict()), max_shard_bytes=max_shard_bytes)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path)
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name


def test_one_tensor_is_held_at_a_time(tmp_path):
    alive = []

    def make():
        assert not [ref for ref in alive if ref() is not None]
        tensor = torch.ones(1000)
        alive.append(weakref.ref(tensor.untyped_storage()))
        return tensor

    write_safetensors(tmp_path, [Entry(str(i), (1000,), torch.float32, make) for i in range(10)], max_shard_bytes=9000)
    assert len(alive) == 10


def test_entries_that_are_refused(tmp_path):
    x = torch.ones(2)
    for name, tensor in [("__metadata__", x), ("complex", x.cfloat())]:
        with pytest.raises(ValueError, match=name):
            write_safetensors(tmp_path, entries({name: tensor}))
    with pytest.raises(ValueError, match="each name once"):
        write_safetensors(tmp_path, entries({"x": x}) * 2)
    assert not any(tmp_path.iterdir())
    with pytest.raises(ValueError, match=r"'x' was to be \(3,\) of torch.float32, got \(2,\)"):
        write_safetensors(tmp_path, [Entry("x", (3,), torch.float32, lambda: x)])
    with pytest.raises(ValueError, match=r"of torch.float16, got \(2,\) of torch.float32"):
        write_pickle(tmp_path / "x.pth", [Entry("x", (2,), torch.float16, lambda: x)])


def test_pickle(tmp_path):
    write_pickle(tmp_path / "x.pth", entries(TENSORS | {"view": torch.zeros(10**6)[:3]}))
    assert (tmp_path / "x.pth").stat().st_size < 20_000
    loaded = torch.load(tmp_path / "x.pth", weights_only=True)
    reader = open_reader(tmp_path)
    assert list(loaded) == list(reader.keys()) == [*TENSORS, "view"]
    for name, tensor in TENSORS.items():
        assert type(loaded[name]) is torch.Tensor
        assert torch.equal(loaded[name], tensor)
        assert torch.equal(reader.read(name), tensor)


# directories


def test_a_directory_appears_when_it_is_whole(tmp_path):
    target = tmp_path / "new" / "model"
    with writing(target) as aside:
        (aside / "config.json").write_text("{}")
        (aside / "sub").mkdir()
        (aside / "sub/x").write_text("x")
        assert not target.exists()
        assert aside.parent == target.parent
    assert sorted(path.name for path in target.rglob("*")) == ["config.json", "sub", "x"]
    assert list(target.parent.iterdir()) == [target]
    (tmp_path / "plain").mkdir()
    assert target.stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_files_are_on_disk_before_the_name_is(tmp_path, monkeypatch):
    events = []
    fsync, rename = os.fsync, os.rename
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append(os.readlink(f"/proc/self/fd/{fd}")), fsync(fd)))
    monkeypatch.setattr(os, "rename", lambda a, b: (events.append("rename"), rename(a, b)))
    with writing(tmp_path / "model") as aside:
        (aside / "x").write_text("x")
    assert events == [f"{aside}/x", str(aside), "rename", str(tmp_path)]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_a_failure_leaves_nothing(error, tmp_path):
    with pytest.raises(error), writing(tmp_path / "model") as aside:  # noqa: PT012
        write_safetensors(aside, entries())
        raise error("midway")
    assert not any(tmp_path.iterdir())


def test_a_tensor_that_fails_midway_leaves_the_old_one(tmp_path):
    def fail():
        raise OSError("disk full")

    with writing(tmp_path / "model") as aside:
        write_safetensors(aside, entries())
    before = (tmp_path / "model/model.safetensors").read_bytes()
    with pytest.raises(OSError, match="disk full"), writing(tmp_path / "model", overwrite=True) as aside:
        write_safetensors(aside, [*entries(), Entry("x", (3,), torch.int8, fail)])
    assert (tmp_path / "model/model.safetensors").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_what_exists_is_not_overwritten_by_itself(tmp_path):
    target = tmp_path / "model"
    target.mkdir()
    with writing(target) as aside:  # empty: fine
        (aside / "old").write_text("old")
    with pytest.raises(ValueError, match=r"model exists and is not empty \(old"), writing(target):
        pytest.fail("must not begin")
    with writing(target, overwrite=True) as aside:
        (aside / "new").write_text("new")
    assert [path.name for path in target.iterdir()] == ["new"]
    with pytest.raises(ValueError, match="new is a file"), writing(target / "new", overwrite=True):
        pytest.fail("must not begin")
    (target / "photos").mkdir()
    with pytest.raises(ValueError, match="has directories in it"), writing(target, overwrite=True):
        pytest.fail("must not begin")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_two_writers_of_one_target(tmp_path):
    with pytest.raises(ValueError, match="not empty"), writing(tmp_path / "model") as first:  # noqa: PT012
        with writing(tmp_path / "model") as second:
            assert first.exists()
            (second / "x").write_text("second")
        (first / "x").write_text("first")
    assert (tmp_path / "model/x").read_text() == "second"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_killed_writer_leaves_no_target(tmp_path):
    """Fault 15's half for directories: kill -9 midway, then the next run works and cleans up."""
    program = f"""
        import os, signal, torch
        from fms.utils.serialization.writers import Entry, write_safetensors, writing

        def killed():
            os.kill(os.getpid(), signal.SIGKILL)

        with writing({str(tmp_path / "model")!r}) as aside:
            one = Entry("a", (10,), torch.float32, lambda: torch.ones(10))
            write_safetensors(aside, [one, Entry("b", (1,), torch.float32, killed)])
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=False)
    assert done.returncode == -signal.SIGKILL
    (stale,) = tmp_path.iterdir()
    assert stale.name.startswith(".model.")
    with writing(tmp_path / "model") as aside:
        write_safetensors(aside, entries())
    assert list(tmp_path.iterdir()) == [tmp_path / "model"]


def test_killed_between_the_renames(tmp_path):
    for name in (".model.0123abcd.writing", ".model.0123abcd.replaced", ".model.2.4567abcd.replaced"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x").write_text(name)
    with pytest.raises(ValueError, match="not empty"), writing(tmp_path / "model"):
        pytest.fail("must not begin")
    assert (tmp_path / "model/x").read_text() == ".model.0123abcd.replaced"
    assert sorted(path.name for path in tmp_path.iterdir()) == [".model.2.4567abcd.replaced", "model"]
    with writing(tmp_path / "model.2") as aside:
        (aside / "x").write_text("new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "model.2"]


# manifest


@pytest.fixture
def listed(tmp_path):
    write_safetensors(tmp_path, entries())
    write_pickle(tmp_path / "z.pth", entries())
    (tmp_path / "config.json").write_text("{}")
    write_manifest(tmp_path)
    return tmp_path


def test_manifest(listed):
    content = json.loads((listed / "manifest.json").read_text())
    assert list(content) == ["config.json", "model.safetensors", "z.pth"]
    assert content["config.json"] == {
        "size": 2,
        "sha256": "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a",
    }
    assert verify_manifest(listed) == []
    (listed / "README.md").write_text("mine")
    assert verify_manifest(listed) == []


@pytest.mark.parametrize("name", ["model.safetensors", "z.pth"])
def test_one_flipped_bit_is_found(name, listed):
    """Fault 2."""
    content = bytearray((listed / name).read_bytes())
    content[len(content) // 2] ^= 1
    (listed / name).write_bytes(content)
    (problem,) = verify_manifest(listed)
    assert problem.startswith(f"{listed / name}: damaged")


def test_every_problem_is_told(listed):
    (listed / "z.pth").unlink()
    (listed / "config.json").write_text("{ }")
    content = json.loads((listed / "manifest.json").read_text())
    content |= {"../x": {"size": 1, "sha256": ""}, "/x": {"size": 1, "sha256": ""}, "y": 3}
    (listed / "manifest.json").write_text(json.dumps(content))
    problems = "\n".join(verify_manifest(listed))
    for part in ("z.pth: missing", "expected 2 bytes, the file has 3", "'../x' needs", "'/x' needs", "'y' needs"):
        assert part in problems
    assert problems.count("\n") == 4
    for text in ("", "{", "[]"):
        (listed / "manifest.json").write_text(text)
        assert len(verify_manifest(listed)) == 1
    (listed / "manifest.json").unlink()
    assert verify_manifest(listed) == [f"{listed / 'manifest.json'}: no such file"]


def test_progress(listed, monkeypatch):
    monkeypatch.setattr(writers, "CHUNK", 100)
    for check in (verify_manifest, write_manifest):
        steps = []
        check(listed, lambda done, total, steps=steps: steps.append((done, total)))
        total = sum(path.stat().st_size for path in listed.iterdir() if path.name != "manifest.json")
        assert len(steps) > 10
        assert [done for done, _ in steps] == sorted(done for done, _ in steps)
        assert steps[-1] == (total, total)
