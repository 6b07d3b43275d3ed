"""Tensor parallelism on real ranks equals one process: logits, tokens, gradients, files, for every family."""

from typing import Any

import pytest
import torch
from torch import Tensor

from fms.distributed import communicator
from fms.models import freeze, get_model
from fms.models.convert import save_model
from fms.utils.generation import generate
from fms.utils.sampling import Sampling, choose, share_of
from tests.distributed.ranks import Ranks

SIZES = {"src_vocab_size": 103, "emb_dim": 64, "nheads": 8, "hidden_dim": 96, "nlayers": 2, "max_expected_seq_len": 64}
DECODER = SIZES | {"head_dim": 8, "kvheads": 4, "pad_id": None}
EXPERTS = {"num_experts": 4, "top_k_experts": 2}
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("llama", "micro", DECODER),
    "llama, two key heads, tied": ("llama", "micro", DECODER | {"kvheads": 2, "tie_heads": True, "pad_id": 60}),
    "llama, one key head": ("llama", "micro", DECODER | {"kvheads": 1}),
    "granite, biases": ("granite", "8b", DECODER | {"attn_bias": True, "mlp_bias": True}),
    "gpt_bigcode": ("gpt_bigcode", "micro", DECODER | {"kvheads": 1}),
    "mistral": ("mistral", "7b", DECODER | {"sliding_window": 6}),
    "qwen3": ("qwen3", "0.6b", DECODER),
    "mixtral": ("mixtral", "8x7b", DECODER | EXPERTS),
    "granite 4": ("granite_moe_hybrid", "8b", DECODER | EXPERTS | {"expert_dim": 32}),
    "roberta": ("roberta", "micro", SIZES | {"p_dropout": 0.0, "attn_dropout": 0.0}),
    "bert classification": ("bert_classification", "base", SIZES | {"p_dropout": 0.0, "attn_dropout": 0.0}),
}
DECODERS = [name for name in CASES if "bert" not in name]
LAYERS = 2


def random_model(case: str, mesh: Any = None, sequence_parallel: bool = False, **more: Any) -> Any:
    """The same random model whatever the ranks: of one process, or placed on a mesh."""
    architecture, variant, fields = CASES[case]
    fields = fields | more
    torch.manual_seed(0)
    kwargs = {"distributed_strategy": "none"} if mesh is None else {"distributed_strategy": "tp", "group": mesh}
    kwargs |= {"sequence_parallel": True} if sequence_parallel else {}
    model = get_model(architecture, variant, **kwargs, **fields)
    with torch.no_grad():
        for parameter in model.parameters():
            getattr(parameter, "_local_tensor", parameter).mul_(8)  # std 0.16
    return model.double()


def calls(comm: Any) -> dict[str, int]:
    return {name: times for name, (times, _) in comm.counts.items()}


def some_ids(*shape: int) -> Tensor:
    return torch.randint(2, 103, shape, generator=torch.Generator().manual_seed(1))


def logits_of(mesh: Any, case: str, frozen: bool) -> tuple[Tensor, dict[str, int]]:
    model = random_model(case, mesh)
    if frozen:
        freeze(model)
    comm = model.embedding.comm
    with torch.no_grad():
        comm.counts.clear()
        logits = model(some_ids(2, 9))
    return logits, calls(comm)


@pytest.mark.parametrize("frozen", [False, True], ids=["", "frozen"])
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("case", CASES)
def test_logits_and_collectives(ranks: Ranks, case: str, size: int, frozen: bool) -> None:
    with torch.no_grad():
        want = random_model(case)(some_ids(2, 9))
    for logits, counts in ranks.run(size, logits_of, case, frozen):
        torch.testing.assert_close(logits, want, rtol=1e-9, atol=1e-9)
        assert counts["all_reduce"] == 1 + 2 * LAYERS
        assert counts.get("all_gather", 0) == (0 if "classification" in case else 1)


def gradients_of(mesh: Any, case: str, sequence_parallel: bool = False) -> dict[str, Tensor]:
    model = random_model(case, mesh, sequence_parallel)
    model(some_ids(2, 9)).square().mean().backward()
    return {name: p.grad.full_tensor() for name, p in model.named_parameters()}


@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["", "tokens too"])
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("case", CASES)
def test_gradients(ranks: Ranks, case: str, size: int, sequence_parallel: bool) -> None:
    model = random_model(case)
    model(some_ids(2, 9)).square().mean().backward()
    want = {name: p.grad for name, p in model.named_parameters()}
    largest = max(gradient.abs().max() for gradient in want.values())
    for got in ranks.run(size, gradients_of, case, sequence_parallel):
        assert got.keys() == want.keys()
        for name in want:
            torch.testing.assert_close(got[name] / largest, want[name] / largest, rtol=0, atol=1e-9, msg=name)


def steps_of(mesh: Any, case: str, sequence_parallel: bool = False) -> list[float]:
    """Losses and gradient norms of four AdamW steps."""
    model = random_model(case, mesh, sequence_parallel)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-4)  # tiny gradients keep their size
    ids, seen = some_ids(2, 10), []
    for _ in range(4):
        loss = torch.nn.functional.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())  # 9 tokens
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        seen += [loss.item(), getattr(norm, "full_tensor", lambda n=norm: n)().item()]
        optimizer.step()
        optimizer.zero_grad()
    return seen


TRAINED = ["llama, two key heads, tied", "granite, biases", "gpt_bigcode", "mixtral", "qwen3", "roberta"]


@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["", "tokens too"])
@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("case", TRAINED)
def test_four_steps_of_training(ranks: Ranks, case: str, size: int, sequence_parallel: bool) -> None:
    want = steps_of(None, case)
    for got in ranks.run(size, steps_of, case, sequence_parallel):
        assert got == pytest.approx(want, rel=1e-7)


OPTIONS: list[dict[str, Any]] = [
    {},
    {"seed": 3, "temperature": 0.8, "top_k": 7},
    {"seed": 4, "top_p": 0.9},
    {"seed": 5, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.3},
    {"seed": 6, "min_p": 0.1},
    {"use_cache": False},
]


def shared_out(mesh: Any, case: str, tokens: int, frozen: bool) -> tuple[Tensor, dict[str, int]]:
    """As `logits_of`, tokens shared out as in a long prefill."""
    communicator.FEW = 2
    model = random_model(case, mesh, sequence_parallel=True)
    if frozen:
        freeze(model)
    with torch.no_grad():
        model.comm.counts.clear()
        logits = model(some_ids(2, tokens))
    communicator.FEW = 128
    return logits, calls(model.comm)


@pytest.mark.parametrize("frozen", [False, True], ids=["", "frozen"])
@pytest.mark.parametrize("case", CASES)
def test_ranks_share_out_any_number_of_tokens(ranks: Ranks, case: str, frozen: bool) -> None:
    model = random_model(case)
    for size, tokens in ((2, 9), (4, 8), (4, 3), (4, 1)):
        with torch.no_grad():
            want = model(some_ids(2, tokens))
        for logits, counts in ranks.run(size, shared_out, case, tokens, frozen):
            torch.testing.assert_close(logits, want, rtol=1e-9, atol=1e-9)
            head = 0 if "classification" in case else 1
            if tokens == 1:
                assert counts == {"all_reduce": 1 + 2 * LAYERS} | ({"all_gather": 1} if head else {})
            else:
                assert counts == {"reduce_scatter": 1 + 2 * LAYERS, "all_gather": 1 + 2 * LAYERS + head}


def embeddings_gradient(mesh: Any, case: str) -> Tensor:
    model = random_model(case, mesh, sequence_parallel=mesh is not None)
    x = torch.randn(2, 7, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).requires_grad_()
    model(x).square().mean().backward()
    return x.grad


@pytest.mark.parametrize("case", ["llama", "roberta"])
def test_embeddings_given_are_shared_out_too(ranks: Ranks, case: str) -> None:
    want = embeddings_gradient(None, case)
    for got in ranks.run(2, embeddings_gradient, case):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


def tokens_of(mesh: Any, case: str, options: dict[str, Any]) -> list[list[int]]:
    model = freeze(random_model(case, mesh))
    rows = [some_ids(9)[:n] for n in (4, 9, 2)]
    return [row.tolist() for row in generate(model, rows, max_new_tokens=8, **options)]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_tokens(ranks: Ranks, options: dict[str, Any]) -> None:
    for case, size in (("llama", 2), ("llama, two key heads, tied", 4)):
        want = tokens_of(None, case, options)
        assert all(got == want for got in ranks.run(size, tokens_of, case, options))


@pytest.mark.parametrize("options", [{}, {"seed": 3, "top_k": 12}], ids=["greedy", "sampled"])
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("case", DECODERS)
def test_tokens_of_each_family(ranks: Ranks, case: str, size: int, options: dict[str, Any]) -> None:
    want = tokens_of(None, case, options)
    assert all(got == want for got in ranks.run(size, tokens_of, case, options))


def token_collectives(mesh: Any, case: str) -> dict[str, int]:
    model = freeze(random_model(case, mesh))
    cache = model.make_cache(1, 20)
    generate(model, some_ids(1, 5), max_new_tokens=2, cache=cache)
    comm = model.embedding.comm
    comm.counts.clear()
    generate(model, some_ids(1, 1), max_new_tokens=1, cache=cache)
    return calls(comm)


def test_one_collective_more_for_the_token(ranks: Ranks) -> None:
    for counts in ranks.run(2, token_collectives, "llama"):
        assert counts == {"all_reduce": 1 + 2 * LAYERS, "all_gather": 1}


def loaded(mesh: Any, path: str, case: str, frozen: bool) -> tuple[Tensor, dict[str, Tensor], int]:
    architecture, variant, fields = CASES[case]
    named = (architecture, variant) if path.endswith("fms") else (None, None)  # those files do not say what they are
    model = get_model(*named, path, distributed_strategy="tp", group=mesh, **(fields if all(named) else {}))
    held = sum(p._local_tensor.numel() for p in model.parameters())
    if frozen:
        freeze(model)
    state = {name: t.full_tensor() if hasattr(t, "full_tensor") else t for name, t in model.state_dict().items()}
    with torch.no_grad():
        return model(some_ids(2, 9)), state, held


@pytest.mark.parametrize("to", ["own", "hf", "meta", "fms"])
def test_files_are_read_into_shards(ranks: Ranks, to: str, tmp_path: Any) -> None:
    case = "llama, two key heads, tied" if to in ("own", "hf") else "llama"
    model = random_model(case)
    save_model(model, tmp_path / to, to)
    with torch.no_grad():
        want = model(some_ids(2, 9))
    whole = sum(p.numel() for p in model.parameters())
    for frozen in (False, True):
        for logits, state, held in ranks.run(2, loaded, str(tmp_path / to), case, frozen):
            torch.testing.assert_close(logits, want, rtol=1e-9, atol=1e-9)
            assert held < 0.55 * whole
            assert state.keys() == model.state_dict().keys()
            assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())


def random_weights(mesh: Any, case: str) -> dict[str, Tensor]:
    """As they are drawn."""
    architecture, variant, fields = CASES[case]
    torch.manual_seed(0)
    kwargs = {"distributed_strategy": "none"} if mesh is None else {"distributed_strategy": "tp", "group": mesh}
    state = get_model(architecture, variant, **kwargs, **fields).state_dict()
    return {name: getattr(t, "full_tensor", lambda t=t: t)() for name, t in state.items()}


@pytest.mark.parametrize("case", ["llama, two key heads, tied", "granite 4", "roberta"])
def test_a_random_model_is_the_same_whatever_the_ranks(ranks: Ranks, case: str) -> None:
    want = random_weights(None, case)
    for size in (1, 2, 4):
        for got in ranks.run(size, random_weights, case):
            assert got.keys() == want.keys()
            assert all(torch.equal(got[name], want[name]) for name in want)


def dropped(mesh: Any, sequence_parallel: bool) -> list[Tensor]:
    """What dropout leaves of ones in a block and in the weights of attention, and the next random number."""
    model = random_model("roberta", mesh, sequence_parallel, p_dropout=0.5, attn_dropout=0.5)
    torch.manual_seed(0)
    model.comm.begin(1, 8)
    block, ones = model.layers[0], torch.ones(1, 8, 16)
    with model.comm.apart(ones.device):
        heads = torch.rand(3)
    return [block.dropout(ones), heads, torch.rand(3)]


def test_dropout_differs_where_the_ranks_work_on_different_things(ranks: Ranks) -> None:
    for sequence_parallel in (False, True):
        one, two = ranks.run(2, dropped, sequence_parallel)
        assert torch.equal(one[0], two[0]) == (not sequence_parallel)
        assert not torch.equal(one[1], two[1])
        assert torch.equal(one[2], two[2])
        assert 0 < (one[0] == 0).sum() < one[0].numel()


def compiled(mesh: Any, case: str, sequence_parallel: bool) -> tuple[Tensor, Tensor]:
    torch._dynamo.reset()
    model = random_model(case, mesh, sequence_parallel)
    run = torch.compile(model, backend="aot_eager", fullgraph=True)
    logits = run(some_ids(2, 9))
    logits.square().mean().backward()
    return logits.detach(), model.layers[0].attn.dense._parameters["weight"].grad.full_tensor()


@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["", "tokens too"])
def test_compiles_without_a_graph_break(ranks: Ranks, sequence_parallel: bool) -> None:
    model = random_model("llama")
    want = model(some_ids(2, 9))
    want.square().mean().backward()
    for logits, gradient in ranks.run(2, compiled, "llama", sequence_parallel):
        torch.testing.assert_close(logits, want.detach(), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(gradient, model.layers[0].attn.dense.weight.grad, rtol=1e-7, atol=1e-9)


def compiled_step(mesh: Any, case: str) -> Tensor:
    """The tokens of some steps, each of them one graph: from the last token to the next."""
    torch._dynamo.reset()
    model = freeze(random_model(case, mesh))
    cache, share = model.make_cache(2, 16), share_of(model.head)
    how, rows = Sampling(do_sample=True, top_k=9, seed=2), torch.arange(2)

    def step(tokens: Tensor, place: Tensor) -> Tensor:
        logits = model(tokens, cache=cache, last_n_tokens=1, local=share is not None)[:, -1]
        return choose(logits, how, rows, place, share)[0]

    run = torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=True)
    with torch.no_grad():
        tokens = [step(some_ids(2, 5), torch.full((2,), 5))]
        for place in range(6, 9):
            tokens.append(run(tokens[-1][:, None], torch.full((2,), place)))
    return torch.stack(tokens, 1)


@pytest.mark.parametrize("case", ["llama", pytest.param("mixtral", marks=pytest.mark.slow)])
def test_a_frozen_step_is_one_graph(ranks: Ranks, case: str) -> None:
    model = freeze(random_model(case))
    want = generate(model, some_ids(2, 5), max_new_tokens=4, top_k=9, seed=2)[:, 5:]
    for tokens in ranks.run(2, compiled_step, case):
        assert torch.equal(tokens, want)
