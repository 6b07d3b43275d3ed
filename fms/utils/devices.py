"""Devices and data types by the names that users give them."""

import torch

from fms.utils.serialization.errors import nearest

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "fp64": torch.float64}
DTYPES |= {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES.values()}


def device_of(name: str | torch.device) -> torch.device:
    """A device by name; "auto" is a GPU if there is one. Raises `ValueError` if there is no such device here."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device_type={name!r}: {str(error).splitlines()[0]}") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device_type={str(name)!r}, but PyTorch {torch.__version__} sees no CUDA device here")
    if device.type == "cuda" and (device.index or 0) >= (count := torch.cuda.device_count()):
        raise ValueError(f"device_type={str(name)!r}, but there are {count} CUDA devices here, from cuda:0 on")
    return device


def dtype_of(name: str | torch.dtype | None) -> torch.dtype | None:
    """A floating data type by name ("bf16", "bfloat16"); `None` stays. Raises `ValueError` for another name."""
    if name is None or (isinstance(name, torch.dtype) and name.is_floating_point):
        return name
    if name not in DTYPES:
        raise ValueError(f"data_type={name!r} is not known{nearest(str(name), DTYPES)}; known are {', '.join(DTYPES)}")
    return DTYPES[name]


def is_out_of_memory(error: Exception) -> bool:
    """Whether it is PyTorch's word, of a GPU or a CPU, that there is not enough memory."""
    return isinstance(error, RuntimeError) and any(
        words in str(error) for words in ("out of memory", "can't allocate memory")
    )
