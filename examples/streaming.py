"""Show a chat model's answer as it comes, drawn at random: python examples/streaming.py DIRECTORY_OR_GGUF_FILE"""

import sys

from fms.models import freeze, get_model
from fms.utils.generation import stream
from fms.utils.tokenizers import get_tokenizer

path = sys.argv[1]
model = freeze(get_model(model_path=path, device_type="auto"))
tokenizer = get_tokenizer(path)
prompt = tokenizer.apply_chat_template([{"role": "user", "content": "Why is the sky blue?"}])
for piece in stream(model, prompt, tokenizer, max_new_tokens=100, temperature=0.7, top_p=0.9, seed=1):
    print(piece, end="", flush=True)
print()
