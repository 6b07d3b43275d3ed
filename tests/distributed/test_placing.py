"""What may say where a model lives, and what each rank reads of its files for it."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from fms.distributed.strategy import TensorParallel
from fms.models import get_model
from fms.models.convert import save_model
from tests.distributed.ranks import Ranks
from tests.distributed.test_tensor_parallel import CASES, random_model, some_ids


class Own:
    """A strategy of a user's own: all but the first block is split."""

    def __init__(self, mesh: Any):
        self.mesh, self.seen = mesh, ""

    def place(self, model: Any) -> None:
        self.seen = model.embedding.weight.device.type
        TensorParallel(self.mesh, {"layers.*.ff.w?": "whole", "layers.*.ff": "within"}, pad=False).place(model)


def placed(mesh: Any, kind: str) -> Tensor:
    architecture, variant, fields = CASES["llama"]
    groups = {"group": mesh.get_group}
    groups["axes"] = lambda: init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    torch.manual_seed(0)
    if kind == "own":
        own = Own(mesh)
        model = get_model(architecture, variant, distributed_strategy=own, **fields)
        assert own.seen == "meta"
        assert model.layers[0].ff.w1.weight.shape == (96, 64)
    else:
        model = get_model(architecture, variant, distributed_strategy="tp", group=groups[kind](), **fields)
    assert model.layers[0].attn.query.weight.shape == (32, 64)
    with torch.no_grad():
        return model(some_ids(2, 9))


@pytest.mark.parametrize(("size", "kind"), [(2, "own"), (2, "group"), (4, "axes")])
def test_a_strategy_a_group_and_a_mesh_are_taken(ranks: Ranks, size: int, kind: str) -> None:
    architecture, variant, fields = CASES["llama"]
    torch.manual_seed(0)
    with torch.no_grad():
        want = get_model(architecture, variant, distributed_strategy="none", **fields)(some_ids(2, 9))
    for logits in ranks.run(size, placed, kind):
        torch.testing.assert_close(logits, want)


def read_bytes(mesh: Any, path: str) -> tuple[int, int, int]:
    """What this rank reads of the files' tensors, what of it it keeps, and how much more the rows have of which it
    keeps some columns."""
    read, preadv = [], os.preadv

    def counting(*args: Any) -> int:
        read.append(preadv(*args))
        return read[-1]

    os.preadv = counting
    try:
        model = get_model(model_path=path, distributed_strategy="tp", group=mesh)
    finally:
        os.preadv = preadv
    shards: dict[str, Any] = dict(model.named_parameters())
    kept = {name: p._local_tensor.nbytes for name, p in shards.items()}
    rest = [p.nbytes - kept[name] for name, p in shards.items() if name.endswith(("dense.weight", "w2.weight"))]
    return sum(read), sum(kept.values()), sum(rest)


@pytest.mark.parametrize("to", ["own", "hf"])
def test_a_rank_reads_what_it_keeps(ranks: Ranks, to: str, tmp_path: Path) -> None:
    model = random_model("llama")
    save_model(model, tmp_path / "out", to)
    whole = sum(p.nbytes for p in model.parameters())
    for read, kept, rest in ranks.run(2, read_bytes, str(tmp_path / "out")):
        assert read == kept + rest
        assert kept < 0.55 * whole


def logits_of(mesh: Any, path: str) -> Tensor:
    with torch.no_grad():
        return get_model(model_path=path, distributed_strategy="tp", group=mesh)(some_ids(2, 9))


@pytest.mark.parametrize("size", [2, 4])
def test_gguf_is_read_into_shards(ranks: Ranks, size: int, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    from tests.utils.test_checkpoint import gguf_of

    model = random_model("llama, two key heads, tied").float()
    path = gguf_of(model, tmp_path / "model.gguf")
    with torch.no_grad():
        want = model(some_ids(2, 9))
    for logits in ranks.run(size, logits_of, str(path)):
        torch.testing.assert_close(logits, want, rtol=1e-4, atol=1e-4)
