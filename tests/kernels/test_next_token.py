"""The end of a greedy decode step: the kernel gives what plain operations give, and both what a loop gives."""

import pytest
import torch
from torch import Tensor

from fms.kernels import next_token
from fms.kernels.next_token import Rows, choose_greedily, make_rows, stop


def given(b: int, n: int, device: str = "cpu") -> tuple[Tensor, Rows]:
    """Some rows are at their end, some at a token of eos, one has equals, one a NaN, one nothing but -inf."""
    logits = torch.randn(b, n).to(torch.bfloat16).float()
    logits[1, [n // 3, n - 1]] = 99.0
    logits[2, n // 2] = float("nan")
    logits[3, n // 4] = float("inf")
    logits[4] = float("-inf")
    rows = make_rows(b, [n // 3, 2], torch.device(device))
    rows.ends.copy_(torch.randint(5, 9, (b, 1)))
    rows.lengths.copy_(torch.randint(2, 5, (b, 1)))
    rows.fed.fill_(1)
    rows.going.copy_(torch.arange(b)[:, None] % 4 != 0)
    return logits.to(device), rows


def check(logits: Tensor, rows: Rows, launch: bool) -> None:
    before = [t.clone() for t in rows]
    (next_token._launch if launch else choose_greedily)(logits, rows)
    for r, row in enumerate(logits.tolist()):
        fit = all(x == x and x != float("inf") for x in row) and any(x != float("-inf") for x in row)
        token = int(rows.fed[r])
        assert int(rows.tokens[r]) == (token if fit else -1)
        if fit:
            assert token == row.index(max(row))
        length = int(before[2][r] + before[3][r])
        assert int(rows.lengths[r]) == length
        over = token in rows.eos.tolist() or length + 1 >= int(rows.ends[r])
        assert int(rows.going[r]) == (0 if over else int(before[3][r]))
    assert not rows.counts.any()


@pytest.mark.parametrize("n", [30, 1500])
def test_plain(n: int) -> None:
    check(*given(9, n), launch=False)


@pytest.mark.filterwarnings("ignore:Conversion of an array")  # of the interpreter itself
@pytest.mark.parametrize("n", [30, 1500])
def test_interpreted(n: int, interpreted: torch.device) -> None:
    check(*given(9, n), launch=True)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_on_a_gpu(dtype: torch.dtype) -> None:
    for n in (24, 49155, 128_256):
        logits, rows = given(9, n, "cuda")
        check(logits.to(dtype), rows, launch=True)
        want, fed = rows.tokens.clone(), rows.fed.clone()
        logits = logits.to(dtype)
        for _ in range(1000):
            choose_greedily(logits, rows)
            assert torch.equal(rows.tokens, want)
            assert torch.equal(rows.fed, fed)
        assert not rows.counts.any()


def test_a_row_that_begins_at_its_end_stops() -> None:
    rows = make_rows(2, [7], torch.device("cpu"))
    rows.going.fill_(1)
    rows.ends.copy_(torch.tensor([[9], [1]]))
    stop(rows)
    assert rows.going.tolist() == [[1], [0]]
