"""Words that are changed, models that can't be split, and models that are padded so that they can."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fms.distributed.strategy import TensorParallel
from fms.models import freeze, get_model
from fms.models.convert import save_model
from fms.modules.tp import Plan, divided
from fms.training.cross_entropy import head_loss
from fms.utils.generation import generate
from tests.distributed.ranks import ROOT, Ranks
from tests.distributed.test_tensor_parallel import CASES, random_model, some_ids

OVERRIDES: list[tuple[str, dict[str, str]]] = [
    ("llama", {"head": "whole"}),
    ("llama", {"embedding": "scatter"}),
    ("mixtral", {"layers.*.ff.experts": "whole_experts"}),
    ("granite 4", {"layers.*.experts": "whole_experts"}),
]


def overridden(
    mesh: Any, case: str, plan: dict[str, str], sequence_parallel: bool
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """The gradients, and logits and sampled tokens of the frozen model."""
    model = random_model(case, mesh, sequence_parallel, **({"tp_plan": plan} if mesh is not None else {}))
    head_loss(model.hidden(some_ids(2, 9)), model.head, some_ids(2, 9), elements=300).backward()
    gradients = {name: getattr(p.grad, "full_tensor", lambda p=p: p.grad)() for name, p in model.named_parameters()}
    with torch.no_grad():
        logits = freeze(model)(some_ids(2, 9))
    return gradients, logits, generate(model, some_ids(2, 9), max_new_tokens=6, seed=1)


@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["", "tokens too"])
@pytest.mark.parametrize(("case", "plan"), OVERRIDES, ids=str)
def test_words_are_overridden(ranks: Ranks, case: str, plan: dict[str, str], sequence_parallel: bool) -> None:
    gradients, logits, tokens = overridden(None, case, plan, False)
    largest = max(gradient.abs().max() for gradient in gradients.values())
    for ours, our_logits, our_tokens in ranks.run(2, overridden, case, plan, sequence_parallel):
        torch.testing.assert_close(our_logits, logits, rtol=1e-9, atol=1e-9)
        assert torch.equal(our_tokens, tokens)
        for name, gradient in gradients.items():
            torch.testing.assert_close(ours[name] / largest, gradient / largest, rtol=0, atol=1e-9, msg=name)


def fails(mesh: Any, options: dict[str, Any]) -> str:
    options = dict(options)
    strategy = TensorParallel(mesh, options.pop("tp_plan", None), pad=False)
    architecture, variant, fields = CASES[options.pop("case", "llama")]
    try:
        get_model(architecture, variant, distributed_strategy=strategy, **(fields | options))
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"nheads": 9, "kvheads": 9}, "9 query heads can't be split over 2 ranks"),
        ({"hidden_dim": 95}, "95 hidden channels can't be split over 2 ranks"),
        ({"nheads": 6, "kvheads": 3}, "3 key and value heads can't be split over 2 ranks"),
        ({"tp_plan": {"hed": "whole"}}, "tp_plan names 'hed', which the plan has not (did you mean 'head'?)"),
        ({"tp_plan": {"head": "columns"}}, "head is 'columns', which is not one of enter"),
        ({"tp_plan": {"layers.*.expert": "whole"}}, "'layers.*.expert', which the plan has not"),
        ({"tp_plan": {"head": "whole"}, "tie_heads": True}, "its weight is tied to one that is placed otherwise"),
        (
            {"case": "mixtral", "num_experts": 3, "tp_plan": {"*.experts": "whole_experts"}},
            "layers.0.ff.experts is 'whole_experts', but 3 along dimension 0 of its wg can't be split over 2 ranks",
        ),
    ],
)
def test_what_can_not_be_split(ranks: Ranks, options: dict[str, Any], words: str) -> None:
    assert all(words in said for said in ranks.run(2, fails, options))


PADDED: list[tuple[int, str, dict[str, Any]]] = [
    (2, "llama", {"nheads": 9, "kvheads": 3}),
    (4, "llama", {"nheads": 9, "kvheads": 3, "attn_bias": True, "mlp_bias": True}),
    (3, "granite, biases", {"hidden_dim": 97}),
    (2, "qwen3", {"nheads": 6, "kvheads": 3}),
    (2, "gpt_bigcode", {"nheads": 9, "kvheads": 1, "hidden_dim": 95}),
    (4, "mixtral", {"nheads": 7, "kvheads": 7, "hidden_dim": 50}),
    (3, "roberta", {}),
]


def padded(mesh: Any, path: str | None, case: str, more: dict[str, Any], frozen: bool) -> tuple[Tensor, bool]:
    model = random_model(case, mesh, **more)
    if path is not None:
        model = get_model(model_path=path, distributed_strategy="tp", group=mesh)
    trains = any(p.requires_grad for p in model.parameters())
    if frozen:
        freeze(model)
    with torch.no_grad():
        return model(some_ids(2, 9)), trains


@pytest.mark.parametrize(("size", "case", "more"), PADDED)
def test_heads_that_do_not_divide_are_padded(
    ranks: Ranks, size: int, case: str, more: dict[str, Any], tmp_path: Any
) -> None:
    model = random_model(case, **more)
    with torch.no_grad():
        want = model(some_ids(2, 9))
    save_model(model, tmp_path / "out")
    for path in (None, str(tmp_path / "out")):
        for frozen in (False, True):
            for logits, trains in ranks.run(size, padded, path, case, more, frozen):
                torch.testing.assert_close(logits, want, rtol=1e-9, atol=1e-9)
                assert not trains


def documented() -> type[nn.Module]:
    """The class that docs/tensor_parallel.md shows."""
    text = (ROOT / "docs/tensor_parallel.md").read_text()
    code = next(block for block in text.split("```python\n")[1:] if "tp_plan" in block).partition("```")[0]
    names: dict[str, Any] = {"nn": nn, "Tensor": Tensor, "Plan": Plan, "divided": divided}
    exec(code, names)
    return names["LowRank"]


def with_a_new_module(mesh: Any) -> tuple[Tensor, Tensor]:
    """A whole model with parts of one's own, placed by hand: its logits, and a gradient."""
    torch.manual_seed(0)
    model = random_model("llama")
    for block in model.layers:
        block.ff = documented()(64, 12).double()
    if mesh is not None:
        TensorParallel(mesh, pad=False).place(model)
    logits = model(some_ids(2, 9))
    logits.square().mean().backward()
    gradient = model.layers[0].ff.down._parameters["weight"].grad
    return logits.detach(), getattr(gradient, "full_tensor", lambda: gradient)()


def test_a_new_module_needs_its_plan_only(ranks: Ranks) -> None:
    want = with_a_new_module(None)
    for got in ranks.run(2, with_a_new_module):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)
