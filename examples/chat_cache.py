"""Two turns of a chat on one cache: the second turn computes its own tokens only.

python examples/chat_cache.py DIRECTORY_OR_GGUF_FILE
"""

import sys

from fms.models import freeze, get_model
from fms.utils.generation import generate
from fms.utils.tensors import GrowingCache
from fms.utils.tokenizers import get_tokenizer

path = sys.argv[1]
model = freeze(get_model(model_path=path))
tokenizer = get_tokenizer(path)
cache = GrowingCache(model.config.nlayers)
messages: list[dict[str, str]] = []
seen: list[int] = []  # what the cache holds, as token ids
for question in ("What is the capital of France?", "And of Spain?"):
    messages.append({"role": "user", "content": question})
    prompt = tokenizer.apply_chat_template(messages)
    same = next((i for i, (old, new) in enumerate(zip(seen, prompt, strict=False)) if old != new), len(seen))
    cache.rewind([same])  # an answer may read differently as tokens once it is part of the history
    (row,) = generate(model, [prompt[same:]], tokenizer=tokenizer, cache=cache, max_new_tokens=40)
    seen = (prompt[:same] + row.tolist())[: cache.length]  # the last token was not computed
    answer = tokenizer.decode(row[len(prompt) - same :])
    messages.append({"role": "assistant", "content": answer})
    print(f"{question}\n{answer}\n({len(prompt) - same} of the {len(prompt)} tokens before it were computed)")
