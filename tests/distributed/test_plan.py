"""Plans as text, what contradicts them, and how they are shown."""

import pytest
import torch

from fms.cli import main
from fms.models import list_models, list_variants
from fms.models.registry import build
from fms.utils.tp_plan import plan_for

ATTENTION = "attn=enter attn.dense=rowwise attn.key=colwise attn.query=colwise attn.value=colwise"
REST = "ff=enter ff.w1=colwise ff.w2=rowwise ff_ln=norm ln=norm dropout=dropout"
GATED = f"{ATTENTION} {REST} ff.wg=colwise"
DECODER = "dec_norm=last_norm emb_dropout=dropout embedding=embed head=head"
ENCODER = "dropout=dropout embedding=embed enc_norm=norm position_embedding=scatter token_type_embedding=scatter"
EXPERTS = "ff=summed ff.experts=experts ff.gate=partial ff_ln=norm ln=norm dropout=dropout"
PLANS = {  # of a block, of the rest
    "llama": (GATED, DECODER),
    "granite": (GATED, DECODER),
    "mistral": (GATED, DECODER),
    "granite_moe_hybrid": (GATED, DECODER),
    "qwen3": (f"{GATED} attn.k_norm=partial attn.q_norm=partial", DECODER),
    "mixtral": (f"{ATTENTION} {EXPERTS}", DECODER),
    "gpt_bigcode": (
        f"{ATTENTION} {REST}".replace("key=colwise", "key=replicate").replace("value=colwise", "value=replicate"),
        f"{DECODER} position_embedding=scatter",
    ),
}
for family in ("bert", "roberta"):
    for task, head in {
        "": "head.dense=whole head.ln=whole head.out=head",
        "_classification": "head.dense=whole head.out=whole",
        "_question_answering": "head.out=whole",
        "_embedding": "pooler=whole",
    }.items():
        PLANS[family + task] = (f"{ATTENTION} {REST}".replace("ff_ln=norm", "ff_ln=last_norm"), f"{ENCODER} {head}")


def described(architecture: str, **fields: object) -> torch.nn.Module:
    with torch.device("meta"):
        return build(architecture, list_variants(architecture)[0], {"nlayers": 1} | fields)


@pytest.mark.parametrize("architecture", list_models())
def test_plans(architecture: str) -> None:
    block, rest = PLANS[architecture]
    want = {f"layers.0.{line}" for line in block.split()} | set(rest.split())
    assert {f"{name}={word}" for name, word in plan_for(described(architecture), 2).items()} == want


def test_fewer_key_heads_than_ranks_are_repeated() -> None:
    model = described("llama", kvheads=2)
    assert plan_for(model, 2)["layers.0.attn.key"] == "colwise"
    assert plan_for(model, 4)["layers.0.attn.key"] == "replicate"


def test_experts_beside_a_shared_one_enter_with_it() -> None:
    plan = plan_for(described("granite_moe_hybrid", num_experts=4, top_k_experts=2, expert_dim=64), 2)
    assert plan["layers.0.ff"] == "summed"
    assert plan["layers.0.ff.w2"] == "addend"
    assert plan["layers.0.ff.routed"] == "within"
    assert plan["layers.0.ff.routed.experts"] == "experts"


def test_a_module_without_a_word_is_an_error() -> None:
    model = described("llama")
    model.extra = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="tp_plan: extra has parameters and no word"):
        plan_for(model, 2)


def test_the_command_shows_shares(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "llama", "2-7b", "--tp", "4"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["layers.*.attn.query.weight", "colwise", "1024", "x", "4096", "32", "268.4"] in lines
    assert ["layers.*.ff.w2.weight", "rowwise", "4096", "x", "2752", "32", "721.4"] in lines
    assert " ".join(lines[-1]) == "3.37 GB a rank in bf16; 65 all-reduces a forward"


def test_the_command_pads_what_does_not_divide(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "llama", "2-7b", "--tp", "3"]) == 0
    out = capsys.readouterr().out
    assert "inference only: 32 query and 32 key and value heads become 33 and 33" in out
    assert "inference only: 11008 hidden channels become 11010" in out
    rows = [line.split() for line in out.splitlines()]
    assert ["layers.*.attn.query.weight", "colwise", "1408", "x", "4096", "32", "369.1"] in rows
