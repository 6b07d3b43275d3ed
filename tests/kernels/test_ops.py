"""Operations as a compiler takes them: schemas that are true, and writes that are not lost."""

import pytest
import torch
from torch import Tensor

from fms.kernels import linear_sum
from fms.kernels.experts import few_through_experts
from fms.kernels.linear_sum import linear_sum_of
from fms.kernels.ops import define
from fms.kernels.skinny import few_rows
from fms.kernels.sum_add import make_peers, peers_of, room

CHECKS = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")


@pytest.mark.parametrize("gated", [False, True])
def test_few_rows(gated: bool) -> None:
    x, weight, bias = torch.randn(2, 1, 16), torch.randn(24, 16), torch.randn(24)
    norm, residual = torch.randn(16), torch.randn(2, 1, 12 if gated else 24)
    torch.library.opcheck(few_rows, (x, weight, bias, 1, norm, None, 1e-6, 1, gated, residual, 0.5), test_utils=CHECKS)


@pytest.mark.filterwarnings("ignore:Conversion of an array")
@pytest.mark.parametrize("at_once", [False, True])
def test_linear_sum(interpreted: torch.device, monkeypatch: pytest.MonkeyPatch, at_once: bool) -> None:
    """Of one rank alone, by the kernel and by its operations one after the other."""
    memory = torch.zeros(room(1) // 8, dtype=torch.long)
    monkeypatch.setitem(peers_of, "alone", make_peers([memory.data_ptr()], 0, interpreted))
    monkeypatch.setattr(linear_sum, "serves", lambda x, weight: at_once)
    x, weight, bias = torch.randn(2, 3, 16).half(), torch.randn(72, 16).half(), torch.randn(72).half()
    residual = torch.randn(3, 2, 72).half().transpose(0, 1)
    given = x, weight, bias, residual, "alone", 0.5
    torch.library.opcheck(linear_sum_of, given, test_utils=CHECKS)
    want = residual.float() + 0.5 * (x.float() @ weight.float().T + bias.float())
    torch.testing.assert_close(linear_sum_of(*given).float(), want, rtol=2e-3, atol=5e-3)
    kept = list(peers_of["alone"].ready.values())
    assert (linear_sum._none in kept) != at_once


def test_experts() -> None:
    x, up, down = torch.randn(3, 8), torch.randn(4, 12, 8), torch.randn(4, 8, 6)
    torch.library.opcheck(
        few_through_experts, (x, up, down, torch.rand(3, 2), torch.randint(4, (3, 2)), 1), test_utils=CHECKS
    )


def _count(seen: Tensor, x: Tensor) -> Tensor:
    seen.add_(1)
    return x * 2


counted = define("counted_by_a_test", _count, lambda seen, x: torch.empty_like(x), ("seen",))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_what_an_operation_writes_is_there(mode: type) -> None:
    with mode():
        seen, x = torch.zeros(3), torch.ones(3)
        torch.library.opcheck(counted, (seen.clone(), x), test_utils=CHECKS)
        run = torch.compile(lambda seen, x: counted(seen, x) + counted(seen, x) + seen, fullgraph=True)
        assert run(seen, x).tolist() == [6.0] * 3
        assert seen.tolist() == [2.0] * 3
