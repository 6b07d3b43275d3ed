"""The frozen form is the same model: names, values, loading, moving, copying; without a second copy of the weights."""

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fms.kernels import add_norm, attend, skinny
from fms.models import Decoder, freeze
from fms.models.freeze import is_frozen
from fms.modules.frozen import FrozenBlock
from tests.small import small_granite, small_model


def random_model(seed: int = 0, **fields: Any) -> Decoder:
    return small_granite(seed=seed, attn_bias=True, mlp_bias=True, **fields)


def logits(model: Decoder) -> Tensor:
    with torch.no_grad():
        return model(torch.arange(20, device=model.embedding.weight.device).view(2, 10))


def storage(model: Decoder) -> int:
    """Bytes behind parameters and what the frozen blocks compute with, each storage once."""
    tensors = list(model.parameters())
    for block in model.layers:
        if isinstance(block, FrozenBlock):
            for fused in (block.qkv, block.dense, block.up, block.down):
                tensors += [t for t in (fused.weight, fused.bias) if t is not None]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


@pytest.mark.parametrize("tied", [False, True])
def test_names_values_and_memory_stay(tied: bool) -> None:
    model = random_model(tie_heads=tied)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    size, want = storage(model), logits(model)
    assert not is_frozen(model)
    assert freeze(model) is model
    assert is_frozen(model)
    assert list(model.state_dict()) == list(before)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert storage(model) == size
    assert not any(p.requires_grad for p in model.parameters())
    assert not model.training
    assert (model.head.weight is model.embedding.weight) == tied
    torch.testing.assert_close(logits(model), want)
    blocks = list(model.layers)
    freeze(model)
    assert all(a is b for a, b in zip(model.layers, blocks, strict=True))


def saved_and_loaded(model: Decoder) -> Decoder:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


CHANGES: dict[str, Callable[[Decoder], Decoder]] = {
    "load_state_dict": lambda model: load(model, assign=False),
    "load_state_dict(assign=True)": lambda model: load(model, assign=True),
    "in place": lambda model: overwrite(model),
    "in place in a copy": lambda model: overwrite(copy.deepcopy(model)),
    "in place in a pickled copy": lambda model: overwrite(saved_and_loaded(model)),
    "to(float64) and back": lambda model: load(model, assign=False).double().float(),
    "a block alone": lambda model: load_block(model),
}


def load(model: Decoder, assign: bool) -> Decoder:
    model.load_state_dict(random_model(1).state_dict(), assign=assign)
    return model


@torch.no_grad()
def overwrite(model: Decoder) -> Decoder:
    for parameter, new in zip(model.parameters(), random_model(1).parameters(), strict=True):
        parameter.copy_(new)
    return model


def load_block(model: Decoder) -> Decoder:
    other = random_model(1)
    for i, block in enumerate(model.layers):
        block.load_state_dict(other.layers[i].state_dict())
    for part in ("embedding", "dec_norm", "head"):
        getattr(model, part).load_state_dict(getattr(other, part).state_dict())
    return model


@pytest.mark.parametrize("change", CHANGES)
def test_new_weights_are_computed_with(change: str) -> None:
    model = freeze(random_model())
    size, want = storage(model), logits(random_model(1))
    assert not torch.allclose(logits(model), want, atol=0.1)
    model = CHANGES[change](model)
    torch.testing.assert_close(logits(model), want)
    assert storage(model) == size
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.gpu
@pytest.mark.parametrize("change", CHANGES)
def test_new_weights_are_launched_with(change: str) -> None:
    """On a GPU each layer keeps what launches its kernels."""
    where = {"device": "cuda", "dtype": torch.bfloat16}
    model = freeze(random_model().to(**where))
    before, want = [logits(model) for _ in range(2)], logits(random_model(1).to(**where))
    assert all(layer.down.ready for layer in model.layers)  # type: ignore[union-attr]
    assert torch.equal(*before)
    assert not torch.allclose(before[0], want, atol=0.4)
    model = CHANGES[change](model).to(**where)
    for _ in range(2):
        torch.testing.assert_close(logits(model), want, rtol=0, atol=0.3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_to_a_dtype(dtype: torch.dtype) -> None:
    model = freeze(random_model())
    size = storage(model)
    want = logits(random_model().to(dtype))
    model.to(dtype)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert storage(model) == size * dtype.itemsize // 4
    torch.testing.assert_close(logits(model), want, rtol=0, atol=0.2 if dtype == torch.bfloat16 else 1e-9)


FAMILIES: dict[str, Callable[[], Decoder]] = {
    "granite": random_model,
    "llama": small_model,
    "gpt_bigcode": lambda: small_model("gpt_bigcode", "ibm.20b"),
    "mixtral": lambda: small_model("mixtral", "8x7b", num_experts=4, top_k_experts=2),
    "mistral, window": lambda: small_model("mistral", "7b", sliding_window=4),
}


def check_many_rows(name: str, near: float, **where: Any) -> None:
    """What goes into a block is left as it is, what it computes is the block's that was not frozen."""
    model = FAMILIES[name]().to(**where)
    x = torch.randn(2, 30, model.config.emb_dim, **where)
    frozen, want, seen = freeze(copy.deepcopy(model)), model.float().hidden(x.float()), []
    for layer in frozen.layers:
        layer.register_forward_hook(lambda _, given, out: seen.append((given[0], given[0].clone(), out, out.clone())))
    given = x.clone()
    got = frozen.hidden(given)
    assert torch.equal(given, x)
    assert len(seen) == len(frozen.layers)
    assert all(torch.equal(*two) for one in seen for two in (one[:2], one[2:]))
    assert ((got.float() - want).norm() / want.norm()).item() < near


@pytest.mark.filterwarnings("ignore:Conversion of an array")  # of the interpreter itself
@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_many_rows_by_the_kernels(name: str, interpreted: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (skinny, add_norm, attend):
        monkeypatch.setattr(module, "passes", lambda x: x.dtype == torch.float16)
    check_many_rows(name, 5e-3, dtype=torch.float16, device=interpreted)


@pytest.mark.gpu
@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_many_rows_on_a_gpu(name: str) -> None:
    check_many_rows(name, 3e-2, dtype=torch.bfloat16, device="cuda")


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("last", [1, 3, 9])
@torch.no_grad()
def test_the_last_block_computes_what_is_asked_for(name: str, last: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = freeze(FAMILIES[name]()), torch.randint(0, 20, (2, 14))
    want, widths = model(ids), []
    end = FrozenBlock.end
    seen = lambda block, x, *args, **how: widths.append(x.shape[1]) or end(block, x, *args, **how)
    monkeypatch.setattr(FrozenBlock, "end", seen)
    cache = model.make_cache(2, 14)
    got = model(ids[:, :9], cache=cache, last_n_tokens=last)
    torch.testing.assert_close(got, want[:, :9][:, -last:], rtol=1e-5, atol=1e-5)
    ends = 1 if "mixtral" in name else 2
    assert widths == [9] * ends * (len(model.layers) - 1) + [last] * ends
    rest = [model(token[:, None], cache=cache, last_n_tokens=1) for token in ids[:, 9:].T]  # reads all keys
    torch.testing.assert_close(torch.cat(rest, 1), want[:, 9:], rtol=1e-5, atol=1e-5)
