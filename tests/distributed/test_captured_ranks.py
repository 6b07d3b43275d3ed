"""The decode step of a model that several ranks hold, captured, gives the tokens of one process."""

import os
import socket
import subprocess
import sys
from typing import Any
from unittest import mock

import pytest
import torch

from fms.models import freeze
from fms.utils import capture as capturing
from fms.utils.capture import _made_of
from fms.utils.generation import Run, generate
from fms.utils.sampling import Sampling, seen_of
from tests.distributed.ranks import ROOT, Ranks
from tests.distributed.test_tensor_parallel import random_model, some_ids
from tests.utils.test_capture import Played

HOW: dict[str, dict[str, Any]] = {"greedy": {}, "sampled": {"do_sample": True, "top_k": 9, "seed": 2}}
HOW["penalised"] = {"repetition_penalty": 1.6}


def replayed(mesh: Any, case: str, how: dict[str, Any]) -> list[list[int]]:
    model = freeze(random_model(case, mesh))
    ids, tokens = some_ids(2, 5), []
    with torch.inference_mode():
        cache = model.make_cache(2, 12)
        model.hidden(ids[:, :-1], cache=cache)
        step = Played(model, cache, Sampling(**how))
        step.begin(ids[:, -1], [12, 10], seen_of(list(ids), Sampling(**how), model.config.src_vocab_size))
        for _ in range(7):
            step.replay()
            tokens.append(step.tokens.clone())
    return torch.stack(tokens, 1).tolist()


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("case", ["llama", "gpt_bigcode", "mistral"])
def test_the_same_tokens_on_several_ranks(ranks: Ranks, case: str, how: str) -> None:
    want = generate(freeze(random_model(case)), some_ids(2, 5), max_new_tokens=7, eos_token_id=(), **HOW[how])
    for tokens in ranks.run(2, replayed, case, HOW[how]):
        assert tokens[0] == want[0, 5:].tolist()
        assert tokens[1][:5] == want[1, 5:10].tolist()  # then the row is full


def prefilled(mesh: Any) -> Any:
    model = freeze(random_model("llama", mesh))
    ids = some_ids(2, 5)
    whole = sum(parameter.numel() for parameter in model.layers[0].parameters())
    enough_for_a_share = {"COME_OFTEN": 2, "LAUNCHED_LATE": 2 * 8 * whole * 0.75}
    with torch.inference_mode(), mock.patch.multiple(capturing, **enough_for_a_share):
        step = Played(model, model.make_cache(2, 40))
        found = []
        for _ in range(3):
            step.cache.hold([0, 0])
            found.append(step.prefill(ids, [5, 3]))
    assert step.share is not None
    even = [torch.nn.functional.pad(part, (0, step.share.size - part.shape[1])) for part in found]
    return [step.share.comm.join(part) for part in even], step.prompts[8, False].graph is None


def test_prompts_through_a_backend_are_launched_plainly(ranks: Ranks) -> None:
    """What NCCL is part of is not kept."""
    model, ids = freeze(random_model("llama")), some_ids(2, 5)
    with torch.inference_mode():
        want = torch.stack([model(ids[:1])[0, -1], model(ids[1:, :3])[0, -1]])
    for found, plain in ranks.run(2, prefilled):
        assert plain
        for logits in found:
            torch.testing.assert_close(logits[:, : want.shape[1]], want, rtol=1e-4, atol=1e-5)


def refused(mesh: Any) -> str:
    model = freeze(random_model("llama", mesh))
    run = Run(model, [torch.tensor([1, 2])], max_new_tokens=20)
    run.device = torch.device("cuda")
    return run._obstacle()


def test_a_backend_of_the_host_is_an_obstacle(ranks: Ranks) -> None:
    assert ranks.run(2, refused) == ["of a model whose ranks sum by gloo: it takes nccl"] * 2


def loaded_again(mesh: Any) -> bool:
    model = freeze(random_model("llama", mesh))
    before = _made_of(model)
    assert _made_of(model) == before
    model.load_state_dict(model.state_dict())  # each block makes its fused weights anew
    return _made_of(model) != before


def test_other_weights_are_noticed_where_they_are_shards(ranks: Ranks) -> None:
    assert ranks.run(2, loaded_again) == [True] * 2


PROGRAM = """
import torch
from fms.distributed.launch import launch
from fms.models import freeze, get_model
from fms.utils import capture as capturing
from fms.utils.generation import generate

launch()
sizes = dict(src_vocab_size=1000, emb_dim=256, nheads=8, kvheads=4, head_dim=32, nlayers=3, max_expected_seq_len=128)
prompts = [torch.arange(20) * 7 % 1000, torch.arange(9), torch.arange(3)]
ways = ({}, {"do_sample": True, "seed": 1}, {"top_k": 20, "top_p": 0.9, "seed": 3}, {"repetition_penalty": 1.4})


def made(architecture, dtype, strategy, **more):
    torch.manual_seed(0)
    variant = "micro" if architecture == "llama" else "8b"
    how = dict(device_type="cuda", data_type=dtype, distributed_strategy=strategy)
    model = get_model(architecture, variant, **how, **sizes, **more)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.mul_(8)
    return freeze(model)


for architecture, dtype, hows in (
    ("llama", "bf16", ways), ("llama", "fp32", ways), ("granite", "bf16", ways[:1]), ("llama", "fp16", ways[:1])
):
    many = made(architecture, dtype, "tp")
    capturing.COME_OFTEN = 2
    capturing.WIDTH = 32 if dtype == "fp32" else 1  # where rounding may change tokens, the kernels of plain launches
    for how in hows:
        plain = generate(many, prompts, max_new_tokens=30, capture=False, **how)
        for _ in range(3):  # what a generation keeps serves the next, and captures its prefill for the one after
            captured = generate(many, prompts, max_new_tokens=30, capture=True, **how)
            assert all(map(torch.equal, plain, captured)), (architecture, dtype, how)
        if dtype == "fp32":
            one = made(architecture, dtype, "none")
            assert all(map(torch.equal, plain, generate(one, prompts, max_new_tokens=30, **how)))
    assert many.comm.symmetric is None or many.comm.counts["all_reduce by symm_mem"][0]
    print(architecture, dtype, many.comm.symmetric, flush=True)
compiled = made("llama", "bf16", "tp", compile="blocks")
a, b = (generate(compiled, prompts, max_new_tokens=20, capture=c) for c in (False, True))
assert all(map(torch.equal, a, b))
torch.distributed.destroy_process_group()
print("all is well")
"""


@pytest.mark.gpu
@pytest.mark.parametrize("communicator", ["auto", "nccl"])
@pytest.mark.parametrize("size", [2, 4])
def test_on_several_gpus(size: int, communicator: str) -> None:
    if torch.cuda.device_count() < size:
        pytest.skip(f"takes {size} GPUs")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={size}", f"--master_port={port}"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "FMS_COMMUNICATOR": communicator}
    done = subprocess.run(
        [*command, "--no-python", sys.executable, "-c", PROGRAM],
        env=environment, capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("all is well") == size
