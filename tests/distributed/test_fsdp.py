"""FSDP and tensor parallelism together on real ranks equal one process."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fms.distributed.fsdp import shard
from fms.distributed.mesh import data_place, make_mesh
from fms.models import get_model
from tests.distributed.ranks import Ranks
from tests.distributed.test_tensor_parallel import random_model, some_ids

LAYOUTS = {  # ranks along replicate, shard and tp; whether tokens are shared out too, whether parameters stay gathered
    "fsdp": ((1, 4, 1), False, True),
    "zero 2": ((1, 4, 1), False, False),
    "hsdp": ((2, 2, 1), False, True),
    "data parallel": ((4, 1, 1), False, True),
    "tp x fsdp": ((1, 2, 2), False, True),
    "tp x fsdp, tokens too": ((1, 2, 2), True, True),
    "tp x data parallel": ((2, 1, 2), False, True),
}


class Loss(nn.Module):
    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        return cross_entropy(self.model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())


def trained(world: Any, case: str, layout: str | None = None) -> tuple[list[float], dict[str, Tensor]]:
    """Losses and gradient norms of four AdamW steps, and the parameters after them."""
    ids, rank, size, tokens, mesh = some_ids(4, 10), 0, 1, False, None
    if layout is not None:
        axes, tokens, gathered = LAYOUTS[layout]
        mesh = make_mesh("cpu", tp=axes[2], shard=axes[1], replicate=axes[0])
        rank, size = data_place(mesh)
    model = random_model(case, mesh["tp"] if mesh is not None and mesh["tp"].size() > 1 else None, tokens)
    root = Loss(model)
    if mesh is not None:
        shard(root, mesh, reshard=gathered)
    mine = ids.chunk(size)[rank]
    optimizer = torch.optim.AdamW(root.parameters(), lr=1e-3, eps=1e-4)
    seen = []
    for _ in range(4):
        loss = root(mine)
        loss.backward()
        norm: Any = nn.utils.clip_grad_norm_(root.parameters(), 1.0)
        mean = loss.detach().clone()
        if mesh is not None:
            for axis in ("replicate", "shard"):
                dist.all_reduce(mean, group=mesh[axis].get_group())
            norm = norm.full_tensor()
        seen += [mean.item() / size, norm.item()]
        optimizer.step()
        optimizer.zero_grad()
    return seen, {name: getattr(p, "full_tensor", lambda p=p: p)().detach() for name, p in model.named_parameters()}


TIED = "llama, two key heads, tied"
BOTH = [layout for layout in LAYOUTS if "tp x fsdp" in layout]
TRIED = [(TIED, layout) for layout in LAYOUTS]
TRIED += [
    (case, layout) for case in ("granite, biases", "gpt_bigcode", "mixtral", "qwen3", "roberta") for layout in BOTH
]


@pytest.mark.parametrize(("case", "layout"), TRIED)
def test_four_steps_equal_one_process(ranks: Ranks, case: str, layout: str) -> None:
    want, parameters = trained(None, case)
    for got, ours in ranks.run(4, trained, case, layout):
        assert got == pytest.approx(want, rel=1e-7)
        for name, parameter in parameters.items():
            torch.testing.assert_close(ours[name], parameter, rtol=1e-7, atol=1e-7, msg=name)


def without_a_head(world: Any | None) -> Tensor:
    torch.manual_seed(0)
    shape: dict[str, Any] = {"src_vocab_size": 103, "emb_dim": 32, "nheads": 4, "nlayers": 2, "hidden_dim": 48}
    model = get_model("roberta_embedding", "base", **shape).eval()
    if world is not None:
        shard(model, make_mesh("cpu"))
    with torch.no_grad():
        return model(some_ids(2, 9))


def test_an_encoder_without_a_head(ranks: Ranks) -> None:
    want = without_a_head(None)
    for got in ranks.run(4, without_a_head):
        torch.testing.assert_close(got, want)


def sizes(world: Any) -> list[Any]:
    mesh = make_mesh("cpu", tp=2)
    try:
        make_mesh("cpu", tp=3)
    except ValueError as error:
        return [mesh.shape, data_place(mesh), mesh["tp"].get_local_rank(), str(error)]
    return []


def test_make_mesh(ranks: Ranks) -> None:
    got = ranks.run(4, sizes)
    assert [place[:3] for place in got] == [[(1, 2, 2), (rank // 2, 2), rank % 2] for rank in range(4)]
    assert all("tp=3 x shard=1 x replicate=1 is not the 4 ranks" in place[3] for place in got)


def looked_at_first(world: Any, reshard: bool) -> list[str]:
    """Parameters that a step does not change, of an optimizer made after a forward without a backward."""
    root = shard(Loss(random_model("granite, biases", None, False)), make_mesh("cpu"), reshard=reshard)
    ids = some_ids(1, 10)
    with torch.no_grad():
        root(ids)
    optimizer = torch.optim.AdamW(root.parameters(), lr=1e-2)
    before = {name: p.full_tensor().clone() for name, p in root.named_parameters()}
    root(ids).backward()
    optimizer.step()
    return [name for name, p in root.named_parameters() if torch.equal(p.full_tensor(), before[name])]


@pytest.mark.parametrize("reshard", [True, False])
def test_a_look_before_the_optimizer_is_made(ranks: Ranks, reshard: bool) -> None:
    assert ranks.run(4, looked_at_first, reshard) == [[]] * 4


def patience(world: Any) -> list[float]:
    mesh = make_mesh("cpu", tp=2)
    groups = [mesh[axis].get_group() for axis in ("replicate", "shard", "tp")]
    return [group._get_backend(torch.device("cpu")).options._timeout.total_seconds() for group in groups]


def test_ranks_of_a_mesh_wait_as_long_as_all_do(ranks: Ranks) -> None:
    assert ranks.run(4, patience) == [[60, 60, 60]] * 4
