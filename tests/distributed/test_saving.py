"""Models split over ranks are saved as one process saves them, and a failure is everybody's."""

from pathlib import Path
from typing import Any

import pytest

from fms.models import freeze
from fms.models.convert import save_model
from fms.utils.serialization.readers import open_reader
from tests.distributed.ranks import Ranks
from tests.distributed.test_tensor_parallel import random_model


def saved(mesh: Any, path: str, to: str, case: str, frozen: bool, more: dict[str, Any]) -> str:
    model = random_model(case, mesh, **more).float()
    return str(save_model(freeze(model) if frozen else model, path, to))


def assert_same_files(one: Path, other: Path) -> None:
    assert sorted(file.name for file in one.iterdir()) == sorted(file.name for file in other.iterdir())
    for file in one.iterdir():
        if file.suffix != ".pth" and file.name != "manifest.json":
            assert file.read_bytes() == (other / file.name).read_bytes(), file.name
    want, got = open_reader(one), open_reader(other)
    keys = list(want.keys())
    assert keys == list(got.keys())
    assert all(want.read(key).equal(got.read(key)) for key in keys)


@pytest.mark.parametrize("frozen", [False, True], ids=["", "frozen"])
@pytest.mark.parametrize(
    ("size", "to", "case", "more"),
    [
        (2, "own", "llama, two key heads, tied", {}),
        (2, "hf", "llama, two key heads, tied", {}),
        (4, "hf", "granite, biases", {}),
        (4, "own", "llama, one key head", {}),
        (4, "meta", "llama", {}),
        (2, "meta", "llama", {"tie_heads": True}),
        (2, "hf", "mixtral", {}),
        (2, "hf", "llama", {"nheads": 9, "kvheads": 3}),
    ],
)
def test_files_are_those_of_one_process(
    ranks: Ranks, size: int, to: str, case: str, more: dict[str, Any], frozen: bool, tmp_path: Path
) -> None:
    save_model(random_model(case, **more).float(), tmp_path / "one", to)
    paths = ranks.run(size, saved, str(tmp_path / "ranks"), to, case, frozen, more)
    assert paths == [str(tmp_path / "ranks")] * size
    assert_same_files(tmp_path / "one", tmp_path / "ranks")


def saved_by_replicas(mesh: Any, path: str) -> str:
    from torch.distributed.device_mesh import init_device_mesh

    both = init_device_mesh("cpu", (2, mesh.size() // 2), mesh_dim_names=("dp", "tp"))
    return str(save_model(random_model("llama", both["tp"]).float(), path))


def test_of_replicas_one_writes(ranks: Ranks, tmp_path: Path) -> None:
    save_model(random_model("llama").float(), tmp_path / "one")
    assert len(ranks.run(4, saved_by_replicas, str(tmp_path / "ranks"))) == 4
    assert_same_files(tmp_path / "one", tmp_path / "ranks")


def refused(mesh: Any, path: str, to: str) -> str:
    with pytest.raises(ValueError, match=r"not empty|can't be written") as error:
        save_model(random_model("llama", mesh), path, to)
    return str(error.value)


@pytest.mark.parametrize(("to", "words"), [("own", "exists and is not empty"), ("howm", "can't be written as 'howm'")])
def test_a_failure_is_raised_by_all_ranks(ranks: Ranks, to: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    for said in ranks.run(4, refused, str(tmp_path), to):
        assert words in said
    assert [file.name for file in tmp_path.iterdir()] == ["mine.txt"]


def interrupted(mesh: Any, path: str) -> str:
    """The first rank's disk is full after some tensors."""
    seen = []

    def progress(done: int, total: int) -> None:
        seen.append(done)
        if len(seen) == 3:
            raise OSError("no space left")

    with pytest.raises((OSError, RuntimeError), match="no space left") as error:
        save_model(random_model("llama", mesh), path, progress=progress)
    return type(error.value).__name__


def test_a_failure_in_the_midst_leaves_nothing(ranks: Ranks, tmp_path: Path) -> None:
    assert ranks.run(2, interrupted, str(tmp_path / "out")) == ["OSError", "RuntimeError"]
    assert not list(tmp_path.iterdir())
