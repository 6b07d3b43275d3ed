"""A tiny chat model on disk, as Hugging Face lays one out: random weights, and a tokenizer trained on a few lines."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

TEMPLATE = (
    "{% for m in messages %}{{ '<|start|>' + m['role'] + '\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
)
LINES = [
    "The quick brown fox jumps over the lazy dog.",
    "user system assistant\nWhat is the capital of France?",
    "Paris.",
]


def write_tiny_chat(directory: Path, **changes: object) -> Path:
    """A llama checkpoint of 2 layers whose context is 256 tokens, with tokenizer and chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<|start|>", "<|end|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(LINES, trainer)
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {"bos_token": "<|start|>", "eos_token": "<|end|>", "chat_template": TEMPLATE}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))

    vocabulary, width, heads, layers, hidden = tokenizer.get_vocab_size(), 32, 4, 2, 48
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocabulary,
        "hidden_size": width,
        "num_attention_heads": heads,
        "num_key_value_heads": 2,
        "num_hidden_layers": layers,
        "intermediate_size": hidden,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 256,
        "tie_word_embeddings": False,
    }
    (directory / "config.json").write_text(json.dumps(config | changes))

    random = torch.Generator().manual_seed(7)

    def weight(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=random) * 0.3

    weights = {"model.embed_tokens": weight(vocabulary, width), "lm_head": weight(vocabulary, width)}
    weights["model.norm"] = torch.ones(width)
    for i in range(layers):
        layer = f"model.layers.{i}"
        for name, rows in (("q", width), ("k", width // 2), ("v", width // 2), ("o", width)):
            weights[f"{layer}.self_attn.{name}_proj"] = weight(rows, width)
        for name, shape in (("gate", (hidden, width)), ("up", (hidden, width)), ("down", (width, hidden))):
            weights[f"{layer}.mlp.{name}_proj"] = weight(*shape)
        for name in ("input_layernorm", "post_attention_layernorm"):
            weights[f"{layer}.{name}"] = torch.ones(width)
    named = {f"{name}.weight": tensor for name, tensor in weights.items()}
    save_file(named, directory / "model.safetensors", metadata={"format": "pt"})
    return directory
