"""Compile kernels for a GPU that need not be there, and print what each reads before it waits for the one ahead."""

import json
import re
from typing import Any

from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fms.kernels.gpu import attend, linear, linear_sum, ranks

HALF, FLOAT, INT = "*bf16", "*fp32", "*i32"
LINEAR = {"x": HALF, "g": HALF, "b": HALF, "w": HALF, "bias": HALF, "residual": HALF, "y": HALF, "eps": "fp32"}
LINEAR |= {"scale": "fp32", "rows": "i32"}
ATTEND = dict.fromkeys(("qkv", "k", "v", "q_norm", "k_norm", "out"), HALF) | {"cos": FLOAT, "sin": FLOAT}
ATTEND |= {"parts": FLOAT, "counts": INT, "positions": "*i64", "scale": "fp32", "eps": "fp32"}
SUM = dict.fromkeys(("y", "residual", "bias", "out"), HALF) | {"bases": "*i64", "times": "*i64"}
SUM |= {"eighths": "i32", "scale": "fp32"}
ATTEND |= dict.fromkeys(("angle_stride", "position_stride", "slots", "capacity"), "i32")


def read_early(kernel: Any, types: dict[str, str], **constants: Any) -> list[str]:
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types[name] for name in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name].startswith("*")}
    fixed = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature, fixed, aligned)
    lowered = compile(source, GPUTarget("cuda", 90, 32), {"num_warps": 4, "launch_pdl": True}).asm["ttgir"]
    head = next(line for line in lowered.splitlines() if "tt.func public" in line)
    given = [name for name in names if name not in constants]
    roots = dict(zip(re.findall(r"(%\w+): ", head), given, strict=True))
    before, wait, _ = lowered.partition("griddepcontrol.wait")
    assert wait
    comes_from = dict(re.findall(r"(%\w+) = (?:tt|ttg)\.\w+ (%\w+)", before))

    def root(value: str) -> str:
        while value not in roots:
            value = comes_from[value]
        return roots[value]

    return sorted({root(value) for value in re.findall(r"(?:async_copy_global_to_local|tt\.load) (%\w+)", before)})


def main() -> None:
    how = {"N": 4096, "K": 4096, "ACT": 1, "BIAS": True, "ADD": True, "EARLY": True}
    stream = how | {"KP": 4096, "KQ": 1, "BN": 2, "GRID": 528, "STAGES": 3, "NORM": 1}
    walk = how | {"BK": 512, "BN": 2, "STAGES": 3, "NORM": 1}
    tile = how | {"M": 16, "BK": 64, "BN": 16, "STAGES": 3}
    heads = {"KV": 2, "D": 64, "HP": 32, "DP": 64, "SPLITS": 4, "PART": 64, "BLOCK": 32, "STAGES": 3, "ROPE": True}
    heads |= {"NORM": True, "EARLY": True}
    sums = {"WIDTH": 4096, "BLOCK": 1024, "SLOT": 1 << 17, "PARTS": 4096, "RANK": 1, "RANKS": 4}
    sums |= {"WAIT": 9, "ADD": True, "BIAS": True, "EARLY": True}
    more = {"PROGRAMS": 1024, "PAIRS": 64, "PARTS": 4096, "TIMES": 384, "RANK": 1, "RANKS": 4, "WAIT": 9}
    summing = more | {"BIAS": True, "EARLY": True, "N": 4096, "K": 5120, "STAGES": 3}
    product = summing | {"KP": 4096, "KQ": 1024, "BN": 4, "GRID": 396}
    products = summing | {"M": 16, "BK": 64, "BN": 16}
    found = {
        "stream": read_early(linear.stream, LINEAR, **stream, GLU=False),
        "stream, gated": read_early(linear.stream, LINEAR, **stream, GLU=True),
        "stream, parts": read_early(linear.stream, LINEAR, **stream | {"K": 5120, "KQ": 1024, "NORM": 2}, GLU=False),
        "walk": read_early(linear.walk, LINEAR, **walk, GLU=True),
        "tile": read_early(linear.tile, LINEAR, **tile, GLU=True),
        "sum": read_early(ranks.sum_add, SUM, **sums),
        "product, sum": read_early(linear_sum.stream_sum, SUM | LINEAR, **product),
        "products, sum": read_early(linear_sum.tile_sum, SUM | LINEAR, **products),
        "attend": read_early(attend.attend, ATTEND, **heads, G=1, GP=1, GB=1),
        "attend, groups": read_early(attend.attend, ATTEND, **heads, G=4, GP=16, GB=4),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
