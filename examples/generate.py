"""Continue a prompt: python examples/generate.py DIRECTORY_OR_GGUF_FILE"""

import sys

from fms.models import freeze, get_model
from fms.utils.generation import generate
from fms.utils.tokenizers import get_tokenizer

path = sys.argv[1]
model = freeze(get_model(model_path=path))
tokenizer = get_tokenizer(path)
print(generate(model, "The capital of France is", tokenizer=tokenizer, max_new_tokens=20))
