"""LoRA by peft: small matrices beside frozen weights, in place, and merged into them at the end."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from fms.utils.serialization.errors import nearest


def add_lora(model: Any, rank: int, alpha: float, targets: Sequence[str]) -> Any:
    """Put matrices of this rank beside the linear layers called `targets`; only they are trained (Hu et al. 2021, arXiv
    2106.09685). Returns the model. Raises `ImportError` without peft, `ValueError` where no layer is called so, or the
    head is the embedding."""
    shared = model.embedding._parameters.get("weight")
    for path, module in model.named_modules():
        name = path.split(".")[-1]
        if name in targets and isinstance(module, nn.Linear) and module._parameters.get("weight") is shared:
            raise ValueError(f"lora_targets: {name}: this model's head is its embedding, which merging would change")
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ImportError("--lora needs peft: pip install peft") from error
    known = list(dict.fromkeys(name.split(".")[-1] for name, m in model.named_modules() if isinstance(m, nn.Linear)))
    for name in targets:  # peft passes over one that is not there if others are
        if name not in known:
            raise ValueError(
                f"lora_targets: no linear layer is called {name!r}{nearest(name, known)}; there are {', '.join(known)}"
            )
    scale: Any = alpha  # peft says int; a fraction is as good
    config = LoraConfig(r=rank, lora_alpha=scale, target_modules=list(targets), lora_dropout=0.0)
    inject_adapter_in_model(config, model)
    return model


def merge_lora(model: Any) -> None:
    """Add the matrices to the weights and take them away: a plain model again."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if hasattr(child, "base_layer"):
                child.merge()
                setattr(module, name, child.get_base_layer())
