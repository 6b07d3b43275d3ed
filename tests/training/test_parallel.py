"""Every strategy on real ranks takes the steps that one process takes, and goes on from what any other has saved."""

import os
import shutil
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from fms.distributed.mesh import data_place
from fms.distributed.strategy import TensorParallel
from fms.kernels import launching
from fms.models import get_model
from fms.training.config import TrainConfig
from fms.training.cross_entropy import head_loss
from fms.training.loop import Trainer
from fms.training.lora import add_lora
from fms.training.loss import IGNORED
from fms.training.metrics import read_rows
from fms.training.objective import LMLoss
from fms.training.optim import clip, local, make_optimizer, step_at_once, steps_at_once
from fms.training.parallel import mesh_for, recompute, share_out, whole
from fms.training.sample import continuation
from tests.distributed.ranks import Ranks
from tests.training.runs import CPU, DECODER, Data, settings, small_model


@pytest.mark.parametrize("mode", ["full", "selective"])
def test_recomputed_gradients_are_the_same(mode: str) -> None:
    batch = next(Data().batches(2))
    want, got = LMLoss(small_model()), LMLoss(small_model())
    recompute(got.model, mode)
    for root in (want, got):
        root(batch).backward()
    for (name, a), b in zip(want.named_parameters(), got.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=0, msg=name)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # the compiler looks for it
@pytest.mark.parametrize("mode", ["full", "selective"])
def test_blocks_that_are_recomputed_are_compiled(mode: str) -> None:
    root, counter = LMLoss(small_model(nlayers=3)), CompileCounter()
    recompute(root.model, mode)
    for block in root.model.layers:
        block.compile(backend=counter)
    root(next(Data().batches(2))).backward()
    assert counter.frame_count == 1  # one graph serves all


def share_of_the_loss(mesh: Any, elements: int) -> tuple[Tensor, Tensor, Tensor, int]:
    torch.manual_seed(0)
    model = get_model("llama", "micro", distributed_strategy="tp", group=mesh, **DECODER).double()
    h = torch.randn(2, 9, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    labels = torch.randint(61, (2, 9), generator=torch.Generator().manual_seed(2))
    labels[1, 3:6] = IGNORED
    comm = model.embedding.comm
    comm.counts.clear()
    loss = head_loss(h, model.head, labels, elements)
    loss.backward()
    count: Any = comm.counts["all_reduce"]
    times = count[0] if isinstance(count, list) else count
    return loss.detach(), h.grad, model.head._parameters["weight"].grad.full_tensor(), times


@pytest.mark.parametrize("elements", [40, 1 << 20])
@pytest.mark.parametrize("size", [2, 4])
def test_loss_of_a_share_of_the_vocabulary(ranks: Ranks, size: int, elements: int) -> None:
    model = small_model().double()
    h = torch.randn(2, 9, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    labels = torch.randint(61, (2, 9), generator=torch.Generator().manual_seed(2))
    labels[1, 3:6] = IGNORED
    want = torch.nn.functional.cross_entropy(
        model.head(h).flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum"
    )
    want.backward()
    for loss, gradient, weight, count in ranks.run(size, share_of_the_loss, elements):
        torch.testing.assert_close(loss, want.detach(), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(gradient, h.grad, rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(weight, model.head.weight.grad, rtol=1e-11, atol=1e-12)
        assert count == 2  # the packed sums in the forward; in the backward what enters the head


WORK: dict[str, dict[str, Any]] = {
    "none": {},
    "ddp": {"distributed": "ddp"},
    "ddp, two forwards": {"distributed": "ddp", "accumulate": 2, "batch_size": 1},
    "fsdp": {"distributed": "fsdp"},
    "zero 2": {"distributed": "fsdp", "zero": 2},
    "hsdp": {"distributed": "hsdp"},
    "tp": {"distributed": "tp"},
    "tp, tokens too": {"distributed": "tp", "sequence_parallel": True},
    "tp+fsdp": {"distributed": "tp+fsdp"},
    "tp+fsdp, tokens too": {"distributed": "tp+fsdp", "sequence_parallel": True},
    "fsdp, recompute": {"distributed": "fsdp", "activation_checkpointing": "full"},
    "tp+fsdp, recompute some": {"distributed": "tp+fsdp", "activation_checkpointing": "selective"},
    "none, lora": {"lora": 4},
    "fsdp, lora": {"distributed": "fsdp", "lora": 4},
    "hsdp, lora": {"distributed": "hsdp", "lora": 4},
}


class Rows(Data):
    """The same rows of a step whatever the ranks and forwards."""

    def __init__(self, rank: int, world: int, accumulate: int):
        super().__init__(rank, world)
        self.accumulate = accumulate

    def batches(self, size: int) -> Any:
        for batch in Data(0, 1).__class__.batches(self._all(), 8):
            mine = {name: value.chunk(self.world)[self.rank] for name, value in batch.items()}
            self.at += 1
            for n in range(self.accumulate):
                yield {name: value.chunk(self.accumulate)[n] for name, value in mine.items()}

    def _all(self) -> Data:
        whole = Data()
        whole.at = self.at
        return whole


def trained(
    world: Any, work: str, output: str, steps: int, model: dict[str, Any], more: dict[str, Any] | None = None
) -> dict[str, Tensor]:
    """The parameters after so many steps."""
    options = {"batch_size": 2} | WORK[work] | (more or {})
    if work.startswith("none"):
        options["batch_size"] = 8
    if work.startswith("tp"):
        options["batch_size"] = 8 if "fsdp" not in work else 4
    config: TrainConfig = settings(output, steps=steps, **options)
    mesh = mesh_for(config, CPU) if not work.startswith("none") else None
    place = data_place(mesh)
    strategy: Any = "none"
    if "tp" in config.distributed:
        assert mesh is not None
        strategy = TensorParallel(mesh["tp"], sequence_parallel=config.sequence_parallel, pad=False)
    torch.manual_seed(0)
    made = get_model("llama", "micro", distributed_strategy=strategy, **(DECODER | model)).double()
    if config.lora:
        add_lora(made, config.lora, config.lora_alpha, ["query", "w1"])
    recompute(made, config.activation_checkpointing)
    root = share_out(LMLoss(made), config, mesh)
    held_out = lambda: Rows(*place, 1).batches(1)
    Trainer(root, Rows(*place, config.accumulate), config, CPU, mesh, place, held_out).run()
    continuation(root, [1, 2, 3], 32, count=2)
    whole(made, True)
    return {name: p.detach() for name, p in made.named_parameters()}


def losses(output: Path) -> list[float]:
    return [row["loss"] for row in read_rows(output) if "loss" in row]


MANY = [work for work in WORK if not work.startswith("none")]
SLOW = pytest.mark.slow  # each rank imports peft


@pytest.mark.parametrize("work", [pytest.param(work, marks=SLOW if "lora" in work else ()) for work in MANY])
def test_equals_one_process_and_resumes_elsewhere(ranks: Ranks, work: str, tmp_path: Path) -> None:
    tied = {"tie_heads": work in ("fsdp", "tp+fsdp")}
    one, then = "none", "fsdp" if "tp" in work else "tp+fsdp"
    if "lora" in work:
        pytest.importorskip("peft")
        one, then = "none, lora", "hsdp, lora" if work == "fsdp, lora" else "fsdp, lora"
    want = trained(None, one, str(tmp_path / "one"), 6, tied)
    first = str(tmp_path / "many")
    ranks.run(4, trained, work, first, 3, tied)
    for got in ranks.run(4, trained, then, first, 6, tied):
        for name, parameter in want.items():
            torch.testing.assert_close(got[name], parameter, rtol=1e-7, atol=1e-7, msg=name)
    assert losses(tmp_path / "many") == pytest.approx(losses(tmp_path / "one"), rel=1e-9)


@pytest.mark.parametrize("work", ["fsdp", "zero 2"])
def test_a_checkpoint_after_an_evaluation_is_whole(ranks: Ranks, work: str, tmp_path: Path) -> None:
    """A forward without a backward leaves parameters gathered."""
    want = trained(None, "none", str(tmp_path / "one"), 4, {})
    many = tmp_path / "many"
    ranks.run(4, trained, work, str(many), 3, {}, {"eval_steps": 1, "eval_batches": 1, "checkpoint_steps": 2})
    shutil.rmtree(many / "step_00000003")
    for got in ranks.run(4, trained, work, str(many), 4, {}):
        for name, parameter in want.items():
            torch.testing.assert_close(got[name], parameter, rtol=1e-7, atol=1e-7, msg=name)


def test_one_process_goes_on_from_four(ranks: Ranks, tmp_path: Path) -> None:
    want = trained(None, "none", str(tmp_path / "one"), 6, {})
    ranks.run(4, trained, "tp+fsdp", str(tmp_path / "many"), 3, {})
    got = trained(None, "none", str(tmp_path / "many"), 6, {})
    for name, parameter in want.items():
        torch.testing.assert_close(got[name], parameter, rtol=1e-7, atol=1e-7, msg=name)
    assert losses(tmp_path / "many") == pytest.approx(losses(tmp_path / "one"), rel=1e-9)


def low(world: Any, output: str, distributed: str = "none", steps: int = 4) -> None:
    size = 2 if distributed == "fsdp" else 8
    config = settings(output, steps=steps, mixed_precision="bf16", batch_size=size, distributed=distributed)
    mesh = mesh_for(config, CPU) if world is not None else None
    place = data_place(mesh)
    torch.manual_seed(0)
    strategy = (
        TensorParallel(mesh["tp"], sequence_parallel=True) if distributed == "tp" and mesh is not None else "none"
    )
    root = share_out(LMLoss(get_model("llama", "micro", distributed_strategy=strategy, **DECODER)), config, mesh)
    Trainer(root, Rows(*place, 1), config, CPU, mesh, place).run()


@pytest.mark.parametrize("distributed", ["fsdp", "tp"])
def test_bf16_of_one_process_is_that_of_many(ranks: Ranks, distributed: str, tmp_path: Path) -> None:
    low(None, str(tmp_path / "one"))
    ranks.run(4, low, str(tmp_path / "many"), distributed)
    one, many = losses(tmp_path / "one"), losses(tmp_path / "many")
    if distributed == "fsdp":
        assert many[0] == pytest.approx(one[0], rel=1e-6)  # the same products of the same copies
    assert many == pytest.approx(one, rel=1e-2)


@pytest.mark.parametrize("distributed", ["fsdp", "tp"])
def test_bf16_goes_on_with_what_was_read(ranks: Ranks, distributed: str, tmp_path: Path) -> None:
    for output, steps in (("through", 4), ("stopped", 2), ("stopped", 4)):
        ranks.run(4, low, str(tmp_path / output), distributed, steps)
    assert losses(tmp_path / "stopped") == losses(tmp_path / "through")


def refused(world: Any, **options: Any) -> str:
    try:
        mesh_for(settings("out", **options), CPU)
    except ValueError as error:
        return str(error)
    return ""


def wrong_sizes(world: Any) -> list[str]:
    return [refused(world), refused(world, distributed="tp", tp=2), refused(world, distributed="tp+fsdp", tp=3)]


def test_sizes_that_do_not_fit(ranks: Ranks) -> None:
    none, tp, both = ranks.run(4, wrong_sizes)[0]
    assert "say which, as --distributed fsdp" in none
    assert "all 4 processes, not tp=2" in tp
    assert "tp=3 x shard=1 x replicate=1 is not the 4 ranks" in both
    assert "start with torchrun" in refused(None, distributed="fsdp")


def at_once(world: Any, work: str, kernel: bool) -> list[Tensor]:
    """This rank's shards after two steps, by the kernel, which Triton's interpreter runs, or without it."""
    before = dict(launching._machines)
    launching._machines[CPU] = launching.Machine(4, False) if kernel else None
    try:
        config = settings("-", batch_size=8 if work == "tp" else 2, clip=0.1, **WORK[work])
        mesh = mesh_for(config, CPU)
        place = data_place(mesh)
        torch.manual_seed(0)
        strategy = TensorParallel(mesh["tp"]) if work == "tp" and mesh is not None else "none"
        root = share_out(LMLoss(get_model("llama", "micro", distributed_strategy=strategy, **DECODER)), config, mesh)
        optimizer = make_optimizer(root.model, 1e-2)
        assert steps_at_once(optimizer) == kernel
        launching._machines[CPU] = None  # for the loss
        for batch in islice(Rows(*place, 1).batches(2), 2):
            (root(batch) / 100).backward()
            if kernel:
                step_at_once(optimizer, 0.1, {})
            else:
                clip(optimizer, 0.1)
                optimizer.step()
            optimizer.zero_grad()
        return [local(p).detach().clone() for p in root.parameters()]
    finally:
        launching._machines.clear()
        launching._machines.update(before)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="TRITON_INTERPRET=1 is not set")
@pytest.mark.parametrize("work", ["fsdp", "tp"])
def test_one_kernel_steps_shards(ranks: Ranks, work: str) -> None:
    pytest.importorskip("triton")
    want, got = ranks.run(4, at_once, work, False), ranks.run(4, at_once, work, True)
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
