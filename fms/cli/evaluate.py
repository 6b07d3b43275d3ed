"""`fms eval`: a model's scores on tasks of lm-eval, or its perplexity on a text."""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fms.cli import flags
from fms.cli.loading import Loaded, load, read_text

if TYPE_CHECKING:
    from fms.utils.tokenizers import BaseTokenizer

Ids = Sequence[int]
NEW_TOKENS = 256  # where a task does not say
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


def add_flags(parser: Any) -> None:
    flags.add_weights(parser, tokenizer="the one beside the weights").add_argument(
        "--dtype", metavar="NAME", help="fp32, bf16 or fp16 (default: the weights' own; GGUF: fp32 on a CPU)"
    )
    flags.add_compile(parser, "none")
    what = parser.add_argument_group("what is measured")
    what.add_argument("--tasks", metavar="NAMES", help="of lm-eval, with commas between (default: none)")
    what.add_argument("--text", type=flags.path, metavar="FILE", help="perplexity of this text (default: none)")
    what.add_argument(
        "--include_path", type=flags.path, metavar="DIR", help="a directory of tasks of your own (default: none)"
    )
    what.add_argument("--num_fewshot", type=int, metavar="N", help="examples in the prompt (default: the task's own)")
    what.add_argument("--limit", type=float, metavar="N", help="only the first N of each task (default: all)")
    what.add_argument(
        "--apply_chat_template", action="store_true", help="put questions into the chat template (default: as they are)"
    )
    what.add_argument(
        "--context", type=flags.count, metavar="N", help="tokens seen at once for a text (default: the model's context)"
    )
    what.add_argument(
        "--batch_size", type=flags.count, default=1, metavar="N", help="sequences that run together (default: 1)"
    )
    what.add_argument("--json", action="store_true", help="as JSON (default: a table)")
    parser.set_defaults(chat_template=None)
    flags.add_debug(parser)


def run(args: argparse.Namespace) -> int:
    if (args.tasks is None) == (args.text is None):
        raise ValueError("what to measure? either --tasks NAMES, of lm-eval, or --text FILE, for its perplexity")
    if args.text is not None:
        text = read_text(args.text)
        found = perplexity(load(args), text, args.context, args.batch_size)
        print(json.dumps(found) if args.json else "  ".join(f"{name} {value:.7g}" for name, value in found.items()))
        return 0
    try:
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager
        from lm_eval.utils import handle_non_serializable, make_table
    except ImportError as error:
        raise ImportError(f"tasks need lm-eval: pip install 'foundation-model-stack[eval]' ({error})") from None
    loaded = load(args)
    results = simple_evaluate(
        harness_model(loaded.model, loaded.tokenizer, args.batch_size),
        tasks=args.tasks.split(","),
        num_fewshot=args.num_fewshot,
        limit=args.limit,
        apply_chat_template=args.apply_chat_template,
        task_manager=TaskManager(include_path=args.include_path),
        bootstrap_iters=1000,
        log_samples=False,
    )
    if args.json:
        json.dump(results["results"], sys.stdout, default=handle_non_serializable)
        print()
    else:
        print(make_table(results))
    return 0


def perplexity(loaded: Loaded, text: str, context: int | None = None, batch_size: int = 1) -> dict[str, float]:
    """Of a text, in windows of `context` tokens that overlap by half, so that each token has half a window before it.

    `bits_per_byte` can be compared between tokenizers. Raises `ValueError` for a context that the model does not have,
    and for a text of fewer than two tokens.
    """
    limit = loaded.model.config.max_positions
    context = min(limit, 2048) if context is None else context
    if not 2 <= context <= limit:
        raise ValueError(f"--context {context} must be from 2 to the {limit} tokens that this model takes")
    check_vocabulary(loaded.model, loaded.tokenizer)
    ids = loaded.tokenizer.encode(text, add_special_tokens=True)
    if len(ids) < 2:
        raise ValueError(f"a text of {len(ids)} tokens has none that follows another: 2 are required")
    pairs, scored = [(ids[:1], ids[1:context])], min(context, len(ids))
    step = context - context // 2
    while scored < len(ids):
        end = min(scored + step, len(ids))
        pairs.append((ids[end - min(end, context) : scored], ids[scored:end]))
        scored = end
    total = sum(score for score, _ in log_likelihoods(loaded.model, pairs, batch_size))
    size = len(text.encode())
    return {
        "perplexity": math.exp(-total / (len(ids) - 1)),
        "bits_per_byte": -total / math.log(2) / size,
        "tokens": len(ids),
        "bytes": size,
    }


def check_vocabulary(model: Any, tokenizer: "BaseTokenizer") -> None:
    if (many := tokenizer.vocab_size()) > (size := model.config.src_vocab_size):
        raise ValueError(f"the tokenizer has {many} tokens, the model's vocabulary {size}: they do not belong together")


def log_likelihoods(model: Any, pairs: Sequence[tuple[Ids, Ids]], batch_size: int = 1) -> list[tuple[float, bool]]:
    """Of each continuation after its context: the sum of its tokens' log-probabilities, and whether each is the
    likeliest. Of what is longer than the model's context the end is taken."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    device, limit = model.embedding.weight.device, model.config.max_positions
    rows = [torch.tensor([*context, *tail])[-limit - 1 :] for context, tail in pairs]
    found: list[tuple[float, bool]] = [(0.0, True)] * len(pairs)
    order = sorted(range(len(pairs)), key=lambda i: -len(rows[i]))
    with torch.inference_mode():
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            batch = pad_sequence([rows[i][:-1] for i in chosen], batch_first=True)  # behind a row's end nobody looks
            h = model.hidden(batch.to(device))
            for i, states in zip(chosen, h, strict=True):
                end = len(rows[i]) - 1
                targets = rows[i][-min(len(pairs[i][1]), end) :].to(device)
                scores = model.head(states[None, end - len(targets) : end])[0].float().log_softmax(-1)
                picked = scores.gather(1, targets[:, None]).sum()
                found[i] = float(picked), bool((scores.argmax(-1) == targets).all())
    return found


def harness_model(model: Any, tokenizer: "BaseTokenizer", batch_size: int = 1) -> Any:
    """A model and its tokenizer as lm-eval takes them: `simple_evaluate(harness_model(model, tokenizer), tasks=...)`.

    Raises `ValueError` if the tokenizer has more tokens than the model.
    """
    from lm_eval.api.model import TemplateLM
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    from fms.utils.generation import generate

    check_vocabulary(model, tokenizer)

    class NativeLM(TemplateLM):
        def __init__(self) -> None:
            super().__init__()
            self.batch_size = batch_size
            self.max_length = model.config.max_positions

        @property
        def tokenizer_name(self) -> str:
            return type(tokenizer).__name__

        @property
        def eot_token_id(self) -> int:
            return tokenizer.eos_token_id or 0

        @property
        def prefix_token_id(self) -> int:
            return self.eot_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
            return tokenizer.encode(string, add_special_tokens=bool(add_special_tokens))

        def chat_template(self, chat_template: bool | str = False) -> str | None:
            return tokenizer.chat_template

        def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
            ids = tokenizer.apply_chat_template(chat_history, add_generation_prompt)
            return tokenizer.decode(ids, skip_special_tokens=False)

        def _loglikelihood_tokens(self, requests: Sequence[tuple], **_: Any) -> list[tuple[float, bool]]:
            return log_likelihoods(model, [(context, tail) for _, context, tail in requests], batch_size)

        def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
            sums = []
            for (text,) in (request.args for request in requests):
                windows = get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.max_length, 1)
                pairs = [make_disjoint_window(window) for window in windows]
                sums.append(sum(score for score, _ in log_likelihoods(model, pairs, batch_size)))
            return sums

        def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
            groups: dict[str, list[int]] = {}
            for i, request in enumerate(requests):
                groups.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(i)
            answers = [""] * len(requests)
            for words, members in groups.items():
                options = json.loads(words)
                for start in range(0, len(members), batch_size):
                    chosen = members[start : start + batch_size]
                    texts = self._continued([requests[i].args[0] for i in chosen], **options)
                    for i, text in zip(chosen, texts, strict=True):
                        answers[i] = text
            return answers

        def _continued(
            self,
            prompts: list[str],
            until: str | list[str] = (),  # type: ignore[assignment]
            max_gen_toks: int = NEW_TOKENS,
            do_sample: bool = False,
            **more: Any,
        ) -> list[str]:
            stops = [stop for stop in ([until] if isinstance(until, str) else until) if stop]
            room = self.max_length - max_gen_toks
            if room < 1:
                raise ValueError(f"max_gen_toks={max_gen_toks} leaves no room in the context of {self.max_length}")
            rows = [self.tok_encode(prompt)[-room:] for prompt in prompts]
            drawn = {n: v for n, v in more.items() if n in SAMPLING} if do_sample else {}
            full = generate(
                model,
                rows,
                tokenizer=tokenizer,
                max_new_tokens=max_gen_toks,
                eos_token_id=list(tokenizer.eos_token_ids) or None,
                stop=stops,
                do_sample=do_sample,
                **drawn,
            )
            texts = [tokenizer.decode(new[len(row) :].tolist()) for row, new in zip(rows, full, strict=True)]
            return [text[: min((at for s in stops if (at := text.find(s)) >= 0), default=None)] for text in texts]

    return NativeLM()
