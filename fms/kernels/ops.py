"""Operations that a compiler takes as they are. `torch.library.custom_op` makes them, too, but looks at every argument
at every call, which takes the host longer than most of these kernels run."""

from collections.abc import Callable, Sequence
from typing import Any

import torch


def define(name: str, function: Callable, fake: Callable, changed: Sequence[str] = ()) -> Any:
    """`torch.ops.fms.<name>`, which calls `function`, without a gradient; `fake` makes what it returns but for the
    contents, and `changed` are arguments that it writes to. Nothing that it returns may be one of its arguments."""
    full = f"fms::{name}"
    torch.library.define(full, torch.library.infer_schema(function, mutates_args=changed))
    torch.library.impl(full, "default", function)
    torch.library.register_fake(full, fake)
    return getattr(torch.ops.fms, name).default
