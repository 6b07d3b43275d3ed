"""A linear layer of few rows and what is around it: whether the kernels serve it, and which of their forms."""

from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fms.kernels.launching import HALF, Machine, Sizes, machine, power, repeated
from fms.kernels.ops import define
from fms.kernels.weights import Weights

ROWS = 32  # the most that the kernels take; from there on cuBLAS is as fast
REGISTERS = 1 << 16  # of a multiprocessor
FUNCTIONS: list[Any] = [lambda x: x, F.silu, F.gelu, partial(F.gelu, approximate="tanh"), F.relu]


def serves(x: Tensor, weight: Tensor) -> bool:
    """Whether the kernels take rows x (..., in) and a weight (out, in)."""
    return (
        x.is_cuda
        and x.dtype in HALF
        and weight.dtype == x.dtype
        and type(weight) in (Tensor, nn.Parameter)
        and 0 < x.numel() <= ROWS * x.shape[-1]
        and weight.is_contiguous()
        and not (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad))
        and (torch.compiler.is_compiling() or machine(x.device) is not None)  # else `few_rows` asks, when it runs
    )


def passes(x: Tensor) -> bool:
    """Whether kernels take activations x, however many rows; a compiler makes such passes by itself."""
    return (
        x.is_cuda
        and x.dtype in HALF
        and x.numel() > 0
        and not (torch.is_grad_enabled() and x.requires_grad)
        and not torch.compiler.is_compiling()
        and machine(x.device) is not None
    )


def norm_kind(norm: nn.Module | None) -> int | None:
    """0: none, 1: RMSNorm, 2: LayerNorm, as the kernels number them; `None`: another, which they don't know."""
    if norm is None:
        return 0
    if len(getattr(norm, "normalized_shape", ())) != 1:
        return None
    if isinstance(norm, nn.RMSNorm) and norm.weight is not None:
        return 1
    return 2 if isinstance(norm, nn.LayerNorm) and norm.bias is not None else None


def parts_of(norm: Any, kind: int) -> tuple[Tensor, Tensor | None, float]:
    """Weight, bias and epsilon of a norm of this kind."""
    return norm.weight, norm.bias if kind == 2 else None, epsilon(norm)


def epsilon(norm: Any) -> float:
    """A norm's own, or what PyTorch takes where it has none: that of what it computes in."""
    kind = norm.weight.dtype
    return torch.finfo(torch.float32 if kind in HALF else kind).eps if norm.eps is None else norm.eps


def norm_now(norm: Any) -> tuple[Any, ...] | None:
    """What a launch that is kept depends on: its parameters must be held, so that no others come to have their ids."""
    if norm is None or (weight := norm._parameters.get("weight")) is None:
        return None
    return id(weight), weight.dtype, weight.device, getattr(norm, "eps", None), id(norm._parameters.get("bias"))


def activation_kind(function: Any) -> int | None:
    """A place in `FUNCTIONS`; `None`: another, which the kernels don't know."""
    if isinstance(function, partial):
        return 3 if function.func is F.gelu and function.keywords == {"approximate": "tanh"} else None
    return 1 if function is F.silu else 2 if function is F.gelu else 4 if function is F.relu else None


def apply(
    x: Tensor,
    linear: Weights,
    norm: nn.Module | None = None,
    activation: int = 0,
    gated: bool = False,
    residual: Tensor | None = None,
    scale: float = 1.0,
) -> Tensor | None:
    """What `few_rows` gives, launched at once or, for a compiler, as one operation; `None` if this is not served."""
    compiling = torch.compiler.is_compiling()
    if not compiling and x.numel() > ROWS * x.shape[-1]:
        return None
    ready = None if compiling else getattr(linear, "ready", None)
    if ready is not None:
        # all that may change: a layer or a norm may be given other parameters, and those other types, at any time
        w, added = linear.weight, residual is None or residual.dtype
        key = x.shape, x.dtype, x.device, w.dtype, w.device, activation, gated, scale, added, norm_now(norm)
        found = ready.get(key)
        if found is not None and not (torch.is_grad_enabled() and (x.requires_grad or w.requires_grad)):
            return found[0](x, residual)
    if not serves(x, linear.weight) or (kind := norm_kind(norm)) is None:
        return None
    weight, bias, eps = (None, None, 0.0) if norm is None else parts_of(norm, kind)
    given = (x, linear.weight, linear.bias, kind, weight, bias, eps, activation, gated, residual, scale)
    if compiling:
        return few_rows(*given)
    again = prepare(*given)
    if ready is not None:
        ready[key] = again, norm and dict(norm._parameters)
    return again(x, residual)


class Choice(NamedTuple):
    """A kernel's name, what it is compiled for, and its warps."""

    form: str
    sizes: dict[str, int]
    warps: int

    def registers(self, m: Machine) -> int:
        """What each thread may have, for as many programs as are planned to be on a multiprocessor at once."""
        each = max(self.sizes["GRID"] // m.multiprocessors, 1)
        return min(REGISTERS // (each * 32 * self.warps) // 8 * 8, 255)


def parts(k: int) -> dict[str, int]:
    """Powers of two that a row of k is read in, the second 1 where one does."""
    half = power(k) // 2
    if 2048 <= half < k <= half + half // 2:
        return {"KP": half, "KQ": max(power(k - half), 2)}
    return {"KP": power(k), "KQ": 1}


@cache
def choose(rows: int, n: int, k: int, norm: int, gated: bool, m: Machine) -> Choice | None:
    """What measured best on an H200 (benchmarks/notes.md); `None` where the norm must be applied before."""
    if rows > 2:
        if norm:
            return None
        height = max(16, power(rows))
        if gated:
            bn, bk, stages, warps = (64, 64, 5, 4) if height == 16 else (32, 128, 3, 2)
        else:
            narrow = (n > 8192 and height == 16) or m.shared < 140 << 10
            bn, bk, stages, warps = 32, 128 if narrow else 256, 5, 2 if height == 16 else 4
        return Choice("tile", {"M": height, "BN": bn, "BK": bk, "STAGES": stages}, warps)
    read, processors = parts(k), m.multiprocessors
    width = read["KP"] + (read["KQ"] if read["KQ"] > 1 else 0)
    if k <= 8192:
        warps = 4 if read["KP"] <= 4096 else 8
        per, stages, at_once = 16 // warps, 3, 2048 * warps // (1 + gated)  # elements of a weight's rows
        per -= (read["KQ"] > 1024) + (norm == 2)  # what a thread keeps of rows leaves registers for no more
        if norm and not gated and width == read["KP"]:
            per, stages, at_once = per + (warps == 4), 4, at_once // 2
        rows_at_once = max(1, min(at_once // read["KP"], n // (per * processors)))
        bn = power(rows_at_once + 1) // 2
        per = max(1, min(per, m.shared // ((stages - 1) * bn * width * (1 + gated) * 2 + 2048)))
        return Choice("stream", read | {"BN": bn, "GRID": processors * per, "STAGES": stages}, warps)
    if norm == 2:
        return None
    if gated:
        return Choice("walk", {"BK": 1024, "BN": 2, "STAGES": 0}, 4)
    if n <= 8 * 4 * processors:  # all programs are there at once
        return Choice("walk", {"BK": 512, "BN": 8, "STAGES": 4}, 4)
    if k <= 16384 and not norm and m.shared > 140 << 10:
        return Choice("stream", read | {"BN": 2, "GRID": processors, "STAGES": 3}, 8)
    return Choice("walk", {"BK": 1024, "BN": 4, "STAGES": 4}, 4)


def prepare(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    norm: int = 0,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 0.0,
    activation: int = 0,
    gated: bool = False,
    residual: Tensor | None = None,
    scale: float = 1.0,
    choice: Choice | None = None,
) -> Callable[[Tensor, Tensor | None], Tensor]:
    """What computes `residual + scale * act(norm(x) @ weight.T + bias)`, gated `act(gate) * up`, of these x (..., in)
    and residual (..., out), and of all others of their shape, type and device."""
    from fms.kernels.gpu import linear as kernels

    m = machine(x.device)
    assert m is not None
    n, k = weight.shape
    n //= 1 + gated
    shape, rows = (*x.shape[:-1], n), x.numel() // k
    made = choice or choose(rows, n, k, norm, gated, m)
    if made is None:
        assert norm_weight is not None
        plain = prepare(x, weight, bias, 0, None, None, 0.0, activation, gated, residual, scale)
        first = prepare_norm(rows, k, norm, norm_weight, norm_bias, eps, m)
        return lambda x, residual: plain(first(x), residual)
    form, chosen, warps = made
    adds, tile = residual is not None, form == "tile"
    norms = () if tile else tuple(weight if t is None else t for t in (norm_weight, norm_bias))
    numbers = (rows, float(scale)) if tile else (rows, float(eps), float(scale))
    fixed = *norms, weight, weight if bias is None else bias

    def sizes() -> Sizes:
        programs = -(-n // chosen["BN"])
        found: dict[str, Any] = {"N": n, "K": k, **chosen, "ACT": activation, "GLU": gated, "BIAS": bias is not None}
        found |= {"ADD": adds, "EARLY": m.early, "num_warps": warps}
        if form == "stream":
            programs = min(programs, chosen["GRID"])
            found |= {"GRID": programs, "maxnreg": made.registers(m)}
        if not tile:
            found["NORM"] = norm
        return (programs,), found

    key = power(rows), n, k, norm, activation, gated, bias is None, adds, choice and str(choice)
    run = repeated(getattr(kernels, form), sizes, key)

    def again(x: Tensor, residual: Tensor | None) -> Tensor:
        x, y = x.contiguous(), x.new_empty(shape)
        run((x, *fixed, x if residual is None else residual.contiguous(), y), numbers)
        return y

    return again


def prepare_norm(
    rows: int, k: int, norm: int, weight: Tensor, bias: Tensor | None, eps: float, m: Machine, adds: bool = False
) -> Callable[..., Tensor]:
    """What normalises (rows, k), by a kernel that is launched early and lets the next one be: x, or if it `adds`, of x,
    residual, scale and total, `residual + scale * x`, which it writes to `total`."""
    from fms.kernels.gpu import rows as kernels

    def sizes() -> Sizes:
        named = {"K": k, "KP": power(k), "LAYER": norm == 2, "ADD": adds, "EARLY": m.early}
        return (rows,), named | {"num_warps": 8 if k > 2048 else 4}

    run, fixed = repeated(kernels.norm, sizes, (rows, k, norm, adds)), (weight, weight if bias is None else bias)

    def again(x: Tensor, residual: Tensor | None = None, scale: float = 1.0, total: Tensor | None = None) -> Tensor:
        x = x.contiguous()
        y = torch.empty_like(x)
        run((x, *fixed, y, *(x if t is None else t for t in (residual, total))), (float(eps), float(scale)))
        return y

    return again


def normalise(x: Tensor, norm: int, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    if norm == 1:
        return F.rms_norm(x, weight.shape, weight, eps)
    return F.layer_norm(x, weight.shape, weight, bias, eps)


def reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    norm: int = 0,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 0.0,
    activation: int = 0,
    gated: bool = False,
    residual: Tensor | None = None,
    scale: float = 1.0,
) -> Tensor:
    """What `prepare` gives computes, in plain operations."""
    if norm_weight is not None:
        x = normalise(x, norm, norm_weight, norm_bias, eps)
    y = F.linear(x, weight, bias)
    gate, up = y.chunk(2, -1) if gated else (y, None)
    y = FUNCTIONS[activation](gate)
    y = y if up is None else y * up
    return y if residual is None else torch.add(residual, y, alpha=scale)


def _few_rows(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm: int,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    activation: int,
    gated: bool,
    residual: Tensor | None,
    scale: float,
) -> Tensor:
    given = (x, weight, bias, norm, norm_weight, norm_bias, eps, activation, gated, residual, scale)
    return reference(*given) if machine(x.device) is None else prepare(*given)(x, residual)


def _like_rows(x, weight, bias, norm, norm_weight, norm_bias, eps, activation, gated, residual, scale):
    return x.new_empty(*x.shape[:-1], weight.shape[0] // (1 + gated))


few_rows = define("few_rows", _few_rows, _like_rows)
