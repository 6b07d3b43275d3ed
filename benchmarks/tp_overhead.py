"""The host's time for tensor parallelism: the blocks of a tiny model, a group whose collectives do nothing, on a CPU.

    python benchmarks/tp_overhead.py [--json FILE]

Ours beside `parallelize_module` of torch on the same modules, both against the model unsharded. In each round all take
their turn: a ratio is the median of those of the rounds, so that a machine that others use, too, does less harm.
`ratio_of_min` is that of the shortest times.
"""

import argparse
import json
import operator
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.testing._internal.distributed.fake_pg import FakeStore

from fms.models import freeze, get_model

TINY = {"src_vocab_size": 64, "emb_dim": 32, "nheads": 4, "kvheads": 4, "head_dim": 8, "hidden_dim": 32}
TINY |= {"nlayers": 10, "max_expected_seq_len": 64, "pad_id": None}
ROUNDS = 150
GOALS = {("frozen forward", "fms"): 1.1, ("training step", "fms"): 1.7}
COLUMNS = ("attn.query", "attn.key", "attn.value", "ff.w1", "ff.wg")
ROWS = ("attn.dense", "ff.w2")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write all figures there")
    args = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    rows = [
        *compared("frozen forward", forward, unsharded=made("none", True), fms=made("tp", True, mesh)),
        *compared("plain forward", forward, unsharded=made("none"), fms=made("tp", group=mesh), torch=stock(mesh)),
        *compared("training step", step, unsharded=made("none"), fms=made("tp", group=mesh), torch=stock(mesh)),
    ]
    print("| what | which | ms | times unsharded | of the shortest | goal |\n|---|---|---|---|---|---|")
    for row in rows:
        print(
            "| {what} | {which} | {ms} | {ratio} | {ratio_of_min} | {goal} |".format_map(
                row | {"goal": row["goal"] or ""}
            )
        )
    if args.json:
        machine = {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count(), "device": "cpu"}
        versions = {"torch": torch.__version__, "python": platform.python_version()}
        about = {"what": "machine", **machine, **versions, "command": " ".join(sys.argv), "rounds": ROUNDS}
        args.json.write_text(json.dumps([about, *rows], indent=1) + "\n")


def made(strategy: str, frozen: bool = False, group: Any = None) -> Any:
    torch.manual_seed(0)
    model = get_model("llama", "micro", distributed_strategy=strategy, group=group, **TINY)
    return freeze(model) if frozen else model


def stock(mesh: Any) -> nn.Module:
    """Torch's own way: a plan of styles for the plain layers."""
    model = made("none")
    for block in model.layers:
        plan = {name: ColwiseParallel() for name in COLUMNS} | {name: RowwiseParallel() for name in ROWS}
        parallelize_module(block, mesh, plan)
    return model


def blocks(model: Any, x: Tensor) -> Tensor:
    angles = model.rope(torch.arange(x.shape[1])[None], x.shape[1])
    for block in model.layers:
        x = block(x, angles)
    return x


@torch.no_grad()
def forward(model: Any, x: Tensor) -> None:
    blocks(model, x)


def step(model: Any, x: Tensor) -> None:
    blocks(model, x.requires_grad_()).sum().backward()
    model.zero_grad(set_to_none=True)


def compared(what: str, run: Callable[[Any, Tensor], None], **models: Any) -> list[dict[str, Any]]:
    x = torch.randn(1, 4, TINY["emb_dim"])
    times: dict[str, list[float]] = {which: [] for which in models}
    for _ in range(ROUNDS + 5):
        for which, model in models.items():
            start = time.perf_counter()
            run(model, x)
            times[which].append((time.perf_counter() - start) * 1e3)
    kept = {which: each[5:] for which, each in times.items()}
    base = kept["unsharded"]
    return [
        {
            "what": what,
            "which": which,
            "ms": round(statistics.median(each), 3),
            "min_ms": round(min(each), 3),
            "ratio": round(statistics.median(map(operator.truediv, each, base)), 2),
            "ratio_of_min": round(min(each) / min(base), 2),
            "goal": GOALS.get((what, which)),
        }
        for which, each in kept.items()
    ]


if __name__ == "__main__":
    main()
