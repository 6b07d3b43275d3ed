"""What kernels run on, and how they are launched."""

from collections.abc import Callable, Sequence
from functools import reduce
from operator import or_
from typing import Any, NamedTuple

import torch
from torch import Tensor

HALF = (torch.float16, torch.bfloat16)


class Machine(NamedTuple):
    multiprocessors: int
    early: bool  # kernels may be launched before the one they depend on has ended
    shared: int = 228 << 10  # bytes of shared memory of a multiprocessor


def machine(device: torch.device) -> Machine | None:
    """What there is to launch on, or `None` where the kernels can't run, or to a compiler, which can't look by itself,
    where nobody has looked before."""
    known = _machines.get(device)
    if known is None and device not in _machines and not torch.compiler.is_compiling():
        known = _machines[device] = _look(device)
    return known


_machines: dict[torch.device, Machine | None] = {}


def _look(device: torch.device) -> Machine | None:
    from importlib.util import find_spec

    if device.type != "cuda" or torch.version.hip or find_spec("triton") is None:
        return None
    properties = torch.cuda.get_device_properties(device)
    if properties.major < 8:  # no bf16
        return None
    shared = properties.shared_memory_per_multiprocessor
    return Machine(properties.multi_processor_count, properties.major >= 9, shared)


def power(n: int) -> int:
    return 1 << (n - 1).bit_length()


Sizes = tuple[tuple[int, ...], dict[str, Any]]  # a grid, and what a kernel is compiled for
_started: dict[Any, Callable[..., None]] = {}
STARTED = 4096  # kept at most: some differ by the length of a prompt
# without a look at whether CUDA has begun: there are tensors on it
_current_device = getattr(torch._C, "_cuda_getDevice", torch.cuda.current_device)


def start(
    kernel: Any, tensors: Sequence[Tensor], numbers: Sequence[Any], sizes: Callable[[], Sizes], key: Any
) -> Callable[..., None] | None:
    """Launch a kernel on tensors and the numbers that follow them, by hand from the second time on: Triton's own look
    for what it has compiled takes longer than most of these kernels run. `key` stands for all that `sizes` depends on.
    Returns what does it for other tensors of these kinds, on the device that is current, if those here are aligned."""
    device = tensors[0].device
    if device.index is not None and device.index != _current_device():
        with torch.cuda.device(device):
            return start(kernel, tensors, numbers, sizes, key)
    addresses = [t.data_ptr() for t in tensors]
    odd = reduce(or_, addresses) % 16 and [address % 16 == 0 for address in addresses]
    # by its id: to take Triton's own hash of a kernel takes longer than all of this
    key = id(kernel), key, device, *[t.dtype for t in tensors], *(odd or ())
    found = _started.get(key)
    if found is None:
        if len(_started) > STARTED:
            _started.clear()
        grid, named = sizes()
        if named.get("EARLY"):
            named["launch_pdl"] = True
        compiled = kernel[grid](*tensors, *numbers, **named)
        if compiled is None:  # the interpreter compiles nothing
            return None
        constants = [named[name] for name in kernel.arg_names[len(tensors) + len(numbers) :]]
        found = _started[key] = _by_hand(compiled, grid, constants, device)
    else:
        found(*addresses, *numbers)
    return None if odd else found


def _by_hand(compiled: Any, grid: tuple[int, ...], constants: list[Any], device: torch.device) -> Callable[..., None]:
    """What launches a compiled kernel, on addresses and numbers: of a tensor, the driver is asked where it lies."""
    from triton.runtime import driver

    stream, index = driver.active.get_current_stream, device.index
    run, function, metadata = compiled.run, compiled.function, compiled.packed_metadata
    blocks = (*grid, 1, 1)[:3]

    def again(*given: Any) -> None:
        run(*blocks, stream(index), function, metadata, None, None, None, *given, *constants)

    return again


def repeated(kernel: Any, sizes: Callable[[], Sizes], key: Any) -> Callable[[Sequence[Tensor], Sequence[Any]], None]:
    """`start`, for tensors that are of the same kinds and on the same device at each call."""
    found: Callable[..., None] | None = None
    index: int | None = None

    def run(tensors: Sequence[Tensor], numbers: Sequence[Any]) -> None:
        nonlocal found, index
        if found is not None and _current_device() == index:
            addresses = [t.data_ptr() for t in tensors]
            if not reduce(or_, addresses) % 16:
                return found(*addresses, *numbers)
        found, index = start(kernel, tensors, numbers, sizes, key), tensors[0].device.index

    return run
