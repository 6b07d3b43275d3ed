"""torch.compile of a model, in place: names of parameters and files stay as they are."""

from typing import Any

from fms.utils.serialization.errors import nearest

# One block is compiled and its graph serves all layers: the time it takes does not grow with their number.
BLOCKS: dict[str, dict[str, Any]] = {"blocks": {}, "max": {"mode": "max-autotune-no-cudagraphs"}}
WHOLE = ("default", "reduce-overhead", "max-autotune")  # torch.compile's own modes, of the whole forward
MODES = ("none", *BLOCKS, *WHOLE)


def check_mode(mode: str) -> None:
    if mode not in MODES:
        raise ValueError(f"compile={mode!r} is not known{nearest(str(mode), MODES)}; there are {', '.join(MODES)}")


def compile_model(model: Any, mode: str = "blocks") -> Any:
    """Compile a decoder or encoder in place, which happens when it first runs; returns it.

    "blocks" compiles the block, once for all layers; "max" does, with kernels chosen by measuring, which takes minutes
    and is for GPUs; "none" undoes it. torch.compile's own modes ("default", "reduce-overhead", "max-autotune") are for
    the whole forward. It comes after what replaces modules (LoRA) and before sharding (FSDP); `freeze` keeps it.

    Raises `ValueError` for another mode.
    """
    check_mode(mode)
    for module in model.modules():
        module._compiled_call_impl = None
    if mode in BLOCKS:
        for block in model.layers:
            block.compile(**BLOCKS[mode])
    elif mode in WHOLE:
        model.compile(mode=mode)
    model.compiled = mode
    return model
