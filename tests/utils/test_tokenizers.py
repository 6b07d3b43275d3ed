"""Every kind of tokenizer against the library it comes from: ids, round trips, streaming, chat, files, errors."""

import base64
import json
import shutil
from pathlib import Path

import mistral_common
import pytest
import sentencepiece
import tiktoken
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tiktoken.load import load_tiktoken_bpe
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from fms.utils.tokenizers import BaseTokenizer, CharTokenizer, from_gguf, get_tokenizer
from fms.utils.tokenizers.bytelevel import LLAMA3_SPLIT, SPLITS

LLAMA2_MODEL = Path(mistral_common.__file__).parent / "data" / "tokenizer.model.v1"
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
HARD = [
    "", "Hello", " Hello", "  two  spaces ", " \n\n x\n", "\ttab\r\n", "👩‍👩‍👧 🇫🇷 e\u0301 q\u0323\u0307 é",
    "日本語、中国 語", "नमस्ते ไทย 한국어",
    "def f(x):\n    return x**2 + 1234567", "<s>hi</s> <|im_start|>user<|im_end|> <|eot_id|>",
    "١٢٣ ½", "a\u00a0b\ufeffd\u3000",
    "\x00\x7f", "'s can't CAN'T", "<0x0A> Ġa", " " * 70 + "a", "$1,000.50!!! ```py```",
]  # fmt: skip
TEXTS = st.one_of(st.sampled_from(HARD), st.text(max_size=40), st.lists(st.sampled_from(HARD), max_size=3).map("".join))
fuzz = settings(max_examples=150, deadline=None)


def write(directory: Path, name: str, content: object) -> None:
    (directory / name).write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")


def streamed(tokenizer: BaseTokenizer, ids: list[int], skip: bool = True) -> list[str]:
    stream = tokenizer.stream(skip_special_tokens=skip)
    return [*(stream.put(i) for i in ids), stream.finish()]


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory as SmolLM's or GPT-2's."""
    directory = tmp_path_factory.mktemp("byte_level")
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([Path(__file__).read_text(encoding="utf-8")], trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 0)]
    )
    backend.enable_truncation(4)
    backend.save(str(directory / "tokenizer.json"))
    write(
        directory,
        "tokenizer_config.json",
        {"bos_token": {"__type": "AddedToken", "content": "<|im_start|>"}, "chat_template": CHATML, "eos_token": None},
    )
    write(directory, "special_tokens_map.json", {"eos_token": {"content": "<|im_end|>", "lstrip": False}})
    return directory


@pytest.fixture(scope="module")
def byte_fallback(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer.json as Llama 2's: SentencePiece's pieces and bytes."""
    directory = tmp_path_factory.mktemp("byte_fallback")
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *"▁abcdefghijklmnopqrstuvwxyzé"]
    vocab = {piece: i for i, piece in enumerate([*pieces, "▁a", "▁▁"])}
    merges = [("▁", "a"), ("▁", "▁")]
    backend = tokenizers.Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    backend.save(str(directory / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": "</s>", "extra_special_tokens": {"image_token": "<image>"}}
    added = {str(len(vocab)): {"content": "<image>", "special": True}}
    write(directory, "tokenizer_config.json", config | {"added_tokens_decoder": added})
    return directory


@pytest.fixture(scope="module")
def word_pieces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer.json whose decoder is of neither family."""
    directory = tmp_path_factory.mktemp("word_pieces")
    vocab = ["[UNK]", "[CLS]", "hello", "##lo", "wor", "##ld", "!", "he", "日", "本"]
    backend = tokenizers.Tokenizer(models.WordPiece({t: i for i, t in enumerate(vocab)}, unk_token="[UNK]"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    backend.add_special_tokens(["[CLS]"])
    backend.save(str(directory / "tokenizer.json"))
    return directory


@pytest.fixture(scope="module")
def fused_bytes(byte_level: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The byte-level one by a decoder of neither family: characters in pieces for the window to hold back."""
    directory = tmp_path_factory.mktemp("fused_bytes")
    backend = tokenizers.Tokenizer.from_file(str(byte_level / "tokenizer.json"))
    backend.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Fuse()])
    backend.save(str(directory / "tokenizer.json"))
    return directory


@pytest.fixture(scope="module")
def llama3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory as Meta's for Llama 3, with ranks of our own."""
    directory = tmp_path_factory.mktemp("llama3")
    words = {bytes(pair) for line in HARD for pair in zip(line.encode(), line.encode()[1:], strict=False)}
    ranks = [*(bytes([b]) for b in range(256)), *sorted(words), b"Hel", b"Hell", b"Hello", b" Hello"]
    ranks += [b"\xff\xff" + i.to_bytes(3, "big") for i in range(128_000 - len(ranks))]
    lines = (f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(ranks))
    write(directory, "tokenizer.model", "".join(lines))
    return directory


@pytest.fixture(scope="module")
def spm() -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(LLAMA2_MODEL))


def spm_metadata(spm: sentencepiece.SentencePieceProcessor) -> dict:
    def kind(i: int) -> int:
        return 2 if spm.is_unknown(i) else 3 if spm.is_control(i) else 6 if spm.is_byte(i) else 1

    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [spm.id_to_piece(i) for i in range(len(spm))],
        "tokenizer.ggml.scores": [spm.get_score(i) for i in range(len(spm))],
        "tokenizer.ggml.token_type": [kind(i) for i in range(len(spm))],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.chat_template": "{{ bos_token }}[INST] {{ messages[0]['content'] }} [/INST]",
    }


def bpe_metadata(directory: Path, pre: str = "gpt-2") -> dict:
    model = json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": sorted(model["vocab"], key=model["vocab"].get),
        "tokenizer.ggml.merges": [" ".join(merge) for merge in model["merges"]],
        "tokenizer.ggml.token_type": [3, 3] + [1] * (len(model["vocab"]) - 2),
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.chat_template": CHATML,
    }


@pytest.fixture(scope="module")
def every(byte_level, byte_fallback, word_pieces, fused_bytes, llama3, spm) -> dict[str, BaseTokenizer]:
    return {
        "char": get_tokenizer("char_tokenizer"),
        "byte_level": get_tokenizer(byte_level),
        "byte_fallback": get_tokenizer(byte_fallback),
        "word_pieces": get_tokenizer(word_pieces / "tokenizer.json"),
        "fused_bytes": get_tokenizer(fused_bytes),
        "tiktoken": get_tokenizer(llama3),
        "sentencepiece": get_tokenizer(LLAMA2_MODEL, "sentencepiece"),
        "gguf_bpe": from_gguf(bpe_metadata(byte_level)),
        "gguf_spm": from_gguf(spm_metadata(spm)),
    }


KINDS = [
    "char",
    "byte_level",
    "byte_fallback",
    "word_pieces",
    "fused_bytes",
    "tiktoken",
    "sentencepiece",
    "gguf_bpe",
    "gguf_spm",
]
EXACT = ["byte_level", "byte_fallback", "fused_bytes", "tiktoken", "sentencepiece", "gguf_bpe", "gguf_spm"]


@pytest.mark.parametrize("kind", EXACT)
def test_round_trip_and_streaming_of_text(every, kind):
    @fuzz
    @given(TEXTS)
    def check(text: str) -> None:
        text = text.replace("▁", "_")  # SentencePiece's spelling of a space
        if kind == "byte_fallback":
            text = text.replace("<", "(")  # no special tokens: each is followed by one more space
        ids = every[kind].encode(text)
        assert every[kind].decode(ids, skip_special_tokens=False) == text
        pieces = streamed(every[kind], ids, skip=False)
        assert "".join(pieces) == text
        assert pieces[-1] == ""  # whole characters come out with their last byte, and none earlier as a replacement
        assert sum(piece.count("\ufffd") for piece in pieces) == text.count("\ufffd")

    check()


@pytest.mark.parametrize("kind", KINDS)
def test_streaming_of_any_ids_is_decode(every, kind):
    tokenizer = every[kind]
    some = st.integers(0, tokenizer.vocab_size() + 2) | st.integers(0, min(tokenizer.vocab_size(), 280))

    @fuzz
    @given(st.lists(some, max_size=30), st.booleans())
    def check(ids: list[int], skip: bool) -> None:
        assert "".join(streamed(tokenizer, ids, skip)) == tokenizer.decode(ids, skip_special_tokens=skip)

    check()


def test_decode_is_the_libraries(every, byte_level, llama3, spm):
    byte = every["byte_level"]
    ranks = every["tiktoken"].encoding

    @fuzz
    @given(st.lists(st.integers(0, 599) | st.integers(0, 300), max_size=12))
    def check(ids: list[int]) -> None:
        assert byte.decode(ids, False) == byte.backend.decode(ids, skip_special_tokens=False)
        assert every["word_pieces"].decode([i % 10 for i in ids]) == every["word_pieces"].backend.decode(
            [i % 10 for i in ids]
        )
        assert every["tiktoken"].decode(ids) == ranks.decode(ids)
        assert every["sentencepiece"].decode(ids) == spm.decode(ids)

    check()


def test_encode_is_the_libraries(every, byte_level, llama3, spm):
    backend = tokenizers.Tokenizer.from_file(str(byte_level / "tokenizer.json"))
    backend.no_truncation()
    special = {"<|begin_of_text|>": 128_000, "<|eot_id|>": 128_009}
    ranks = load_tiktoken_bpe(str(llama3 / "tokenizer.model"))
    meta = tiktoken.Encoding("reference", pat_str=LLAMA3_SPLIT, mergeable_ranks=ranks, special_tokens=special)
    references = {
        "byte_level": (0, lambda text: backend.encode(text, add_special_tokens=False).ids),
        "sentencepiece": (1, spm.encode),
        "tiktoken": (128_000, lambda text: meta.encode(text, allowed_special="all")),
    }
    references |= {"gguf_bpe": references["byte_level"], "gguf_spm": references["sentencepiece"]}

    @fuzz
    @given(TEXTS)
    def check(text: str) -> None:
        for kind, (bos, reference) in references.items():
            assert every[kind].encode(text) == reference(text), kind
            assert every[kind].encode(text, add_special_tokens=True) == [bos, *reference(text)], kind

    check()


def test_special_tokens_in_text(every):
    assert every["byte_level"].encode("a<|im_end|>")[-1] == 1
    assert every["tiktoken"].encode("a<|eot_id|>")[-1] == 128_009
    assert 2 not in every["sentencepiece"].encode("a</s>")
    assert every["byte_fallback"].encode("<image>")[-1] == every["byte_fallback"].vocab_size() - 1


def test_first_space_belongs_to_the_first_word(every):
    for kind in ("sentencepiece", "gguf_spm", "byte_fallback"):
        ids = every[kind].encode(" a b")
        assert "".join(streamed(every[kind], [1, *ids])) == " a b"
        assert every[kind].decode(ids[1:]) == "a b"


def test_broken_bytes(every):
    euro = every["sentencepiece"].convert_tokens_to_ids(["<0xE2>", "<0x82>", "<0xAC>"])
    assert streamed(every["sentencepiece"], euro) == ["", "", "€", ""]
    assert streamed(every["sentencepiece"], [*euro[:2], 1, euro[2]]) == ["", "", "\ufffd\ufffd", "\ufffd", ""]
    euro = every["tiktoken"].encode("€x", False)
    assert every["tiktoken"].decode([0xE2, 0x82, ord("x")]) == "\ufffdx"
    assert streamed(every["tiktoken"], [0xE2, 0x82]) == ["", "", "\ufffd"]


@pytest.mark.parametrize("kind", KINDS)
def test_ids_and_tokens(every, kind):
    tokenizer = every[kind]
    tokens = tokenizer.tokenize("he said: hello!")
    ids = tokenizer.encode("he said: hello!")
    assert tokens == tokenizer.convert_ids_to_tokens(ids)
    assert tokenizer.convert_tokens_to_ids(tokens) == ids
    assert tokenizer.convert_tokens_to_ids(tokens[0]) == ids[0]
    assert tokenizer.convert_tokens_to_string(tokens) == tokenizer.decode(ids, skip_special_tokens=False)
    assert max(ids) < tokenizer.vocab_size()
    assert tokenizer.decode([tokenizer.vocab_size() + 5]) == ""


def test_special_ids(every):
    def ids(kind: str) -> tuple:
        t = every[kind]
        return t.bos_token_id, t.eos_token_id, t.eos_token_ids, t.pad_token_id, len(t.special_ids), t.vocab_size()

    assert ids("char") == (2, 3, (3,), None, 2, 256)
    assert ids("byte_level") == ids("gguf_bpe") == (0, 1, (1,), None, 2, 600)
    assert ids("byte_fallback") == (1, 2, (2,), None, 4, 290)
    assert ids("tiktoken") == (128_000, 128_001, (128_001, 128_009, 128_008), 128_004, 256, 128_256)
    assert ids("sentencepiece") == ids("gguf_spm") == (1, 2, (2,), None, 2, 32_000)
    assert every["byte_fallback"].special_tokens["image_token"] == "<image>"


@pytest.mark.parametrize("kind", KINDS)
def test_save_gives_the_same_tokenizer(every, kind, tmp_path):
    every[kind].save(tmp_path / "new" / "directory")
    again = get_tokenizer(str(tmp_path / "new" / "directory"))
    same = ("bos_token_id", "eos_token_ids", "pad_token_id", "special_ids", "special_tokens", "chat_template")
    for name in same:
        assert getattr(again, name) == getattr(every[kind], name), name
    for text in HARD:
        assert again.encode(text, add_special_tokens=True) == every[kind].encode(text, add_special_tokens=True)
    again.save(tmp_path / "new" / "directory")  # onto itself


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "char"])
def test_text_that_is_not_unicode(every, kind):
    with pytest.raises(ValueError, match="surrogates not allowed"):
        every[kind].encode("a\ud800")


def test_long_runs_for_tiktoken(every):
    for text in (" " * 200_000, "a" * 60_000, "\n" * 60_000 + "a"):
        assert every["tiktoken"].decode(every["tiktoken"].encode(text)) == text


class Upper(BaseTokenizer):
    """A tokenizer of another package: the five methods and no more; its first word has no space before it."""

    longest = 0

    def tokenize(self, text):
        return text.split()

    def convert_ids_to_tokens(self, ids):
        self.longest = max(self.longest, len(ids))
        return ["\ufffd" if i == 0 else "abcdefghij"[i % 10] for i in ids]

    def convert_tokens_to_ids(self, tokens):
        return [ord(token) for token in tokens]

    def convert_tokens_to_string(self, tokens):
        return " ".join(tokens)

    def vocab_size(self):
        return 128


def test_a_tokenizer_of_another_package():
    tokenizer = Upper(2, [3, 4])
    assert tokenizer.eos_token_id == 3
    assert tokenizer.special_ids == {2, 3, 4}
    assert tokenizer.encode("x y", add_special_tokens=True) == [2, ord("x"), ord("y")]
    assert streamed(tokenizer, [2, 11, 2, 12]) == ["", "b", "", " c", ""]
    ids = [11, *range(200), *([0] * 200), 15, 16, *([2] * 100), 17]
    tokenizer.longest = 0
    pieces = streamed(tokenizer, ids)
    assert tokenizer.longest <= 20  # the cost of a token does not grow with the text
    assert "".join(pieces) == tokenizer.decode(ids)
    with pytest.raises(NotImplementedError, match="Upper"):
        tokenizer.save("x")


def test_chat_is_transformers(byte_level, tmp_path):
    transformers = pytest.importorskip("transformers")
    template = (
        "{% for m in messages %}\n  {%- if loop.index > 3 %}{% break %}{% endif %}\n"
        "  {% generation %}{{ bos_token }}{{ m['content'] | tojson }}{% endgeneration %}\n{% endfor %}"
        "{% if tools is not none %}{{ tools | tojson(indent=1) }}{% endif %}{{ strftime_now('%Y') }}{{ unk_token }}"
        "{% set ns = namespace(a=1) %}{% set ns.a = 2 %}{{ ns.a }}{{ eos_token }}"
        "{% if add_generation_prompt %}go{% endif %}"
    )
    chat = [{"role": "user", "content": 'Hi <b> é "q" <|im_end|>'}, {"role": "assistant", "content": "\n x"}] * 2
    for template_file, variables in ((template, {}), (CHATML, {}), (template, {"tools": [{"name": "f<"}]})):
        shutil.copytree(byte_level, tmp_path, dirs_exist_ok=True)
        write(tmp_path, "chat_template.jinja", template_file)
        ours, theirs = get_tokenizer(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
        for prompt in (True, False):
            expected = theirs.apply_chat_template(chat, add_generation_prompt=prompt, **variables)["input_ids"]
            assert ours.apply_chat_template(chat, add_generation_prompt=prompt, **variables) == expected


def test_chat_writes_special_tokens_once(every, spm):
    chat = [{"role": "user", "content": "hi"}]
    assert every["gguf_spm"].apply_chat_template(chat) == [1, *spm.encode("[INST] hi [/INST]")]
    ids = every["gguf_bpe"].apply_chat_template(chat)
    assert ids == every["byte_level"].apply_chat_template(chat)
    assert [i for i in ids if i < 2] == [0, 1, 0]
    with pytest.raises(ValueError, match="no chat template"):
        every["tiktoken"].apply_chat_template(chat)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ cycler.__init__.__globals__.os }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{% set ns = namespace(__class__=1) %}", "__class__"),
        ("{% set ns = namespace() %}{% set ns.__dict__ = 1 %}", "__dict__"),
        ("{{ range(10**9) }}", "Range too big"),
        ("{{ 'a' + messages[0]['content'] + 1 }}", "str"),
        ("{% for %}", "Expected an expression"),
    ],
)
def test_chat_template_that_fails_or_attacks(template, message):
    tokenizer = CharTokenizer()
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match=message):
        tokenizer.apply_chat_template([{"role": "user", "content": "hi"}])


def test_small_files_of_a_directory(byte_level, tmp_path):
    shutil.copy(byte_level / "tokenizer.json", tmp_path)
    write(tmp_path, "config.json", {"bos_token_id": 0, "eos_token_id": [1, 5], "pad_token_id": None})
    tokenizer = get_tokenizer(tmp_path)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_ids, tokenizer.chat_template) == (0, (1, 5), None)
    templates = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    write(tmp_path, "tokenizer_config.json", {"eos_token": "<end>", "pad_token": "!", "chat_template": templates})
    tokenizer = get_tokenizer(tmp_path)
    assert (tokenizer.eos_token_ids, tokenizer.encode("a<end>")[-1], tokenizer.chat_template) == ((600,), 600, "d")
    assert tokenizer.pad_token_id in tokenizer.special_ids
    write(tmp_path, "tokenizer_config.json", {"added_tokens_decoder": {"7": {"content": "<new>"}}})
    with pytest.raises(ValueError, match="'<new>' has id 600 there, and 7"):
        get_tokenizer(tmp_path)
    write(tmp_path, "tokenizer_config.json", "{'a': 1}")
    with pytest.raises(ValueError, match=r"tokenizer_config.json is not JSON"):
        get_tokenizer(tmp_path)


def test_tokens_after_a_sentencepiece_model(spm, tmp_path):
    shutil.copy(LLAMA2_MODEL, tmp_path / "tokenizer.model")
    write(tmp_path, "added_tokens.json", {"<|im_start|>": 32_000})
    added = {"32001": {"content": "<|im_end|>", "special": True}}
    config = {"eos_token": "<|im_end|>", "chat_template": CHATML, "added_tokens_decoder": added, "add_bos_token": False}
    write(tmp_path, "tokenizer_config.json", config)
    tokenizer = get_tokenizer(tmp_path)
    assert (tokenizer.vocab_size(), tokenizer.eos_token_ids, 32_001 in tokenizer.special_ids) == (
        32_002,
        (32_001,),
        True,
    )
    assert tokenizer.encode("a<|im_end|>", add_special_tokens=True) == [*spm.encode("a"), 32_001]
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], add_generation_prompt=False)
    assert ids == [32_000, *spm.encode("user\nhi"), 32_001, *spm.encode("\n")]
    assert tokenizer.decode([32_000, *spm.encode("a"), 32_001], skip_special_tokens=False) == "<|im_start|> a<|im_end|>"


@pytest.mark.parametrize(
    ("pre", "text", "words"),
    [
        ("gpt-2", "I'm 1234 ok!", ["I", "'m", "Ġ1234", "Ġok", "!"]),
        ("smollm", "I'm 1234 ok!", ["I", "'m", "Ġ", "1", "2", "3", "4", "Ġok", "!"]),
        ("refact", "x=½²", ["x", "=", "Â½", "Â²"]),
        ("llama-bpe", "I'M 1234 (ok\n", ["I", "'M", "Ġ", "123", "4", "Ġ(", "ok", "Ċ"]),
        ("default", "Say (hi) 1234", ["Say", "Ġ", "(", "hi", ")", "Ġ", "123", "4"]),
        ("tekken", "HelloWorld 12", ["Hello", "World", "Ġ", "1", "2"]),
        ("qwen2", "12 a", ["1", "2", "Ġa"]),
    ],
)
def test_gguf_splits(byte_level, pre, text, words):
    backend = from_gguf(bpe_metadata(byte_level, pre)).backend
    assert [word for word, _ in backend.pre_tokenizer.pre_tokenize_str(text)] == words


def test_gguf_metadata(byte_level, spm, tmp_path):
    metadata = bpe_metadata(byte_level, "llama-bpe")
    metadata |= {"tokenizer.ggml.eot_token_id": 5, "tokenizer.ggml.token_type": [3, 4] + [1] * 598}
    del metadata["tokenizer.ggml.add_bos_token"]
    tokenizer = from_gguf(metadata)
    assert tokenizer.eos_token_ids == (1, 5)
    tokenizer.save(tmp_path)
    assert get_tokenizer(tmp_path).eos_token_ids == (1, 5)
    assert tokenizer.encode("a", add_special_tokens=True)[0] == 0  # Llama 3's files add bos when they do not say
    for pre, whole in (("llama-bpe", True), ("gpt-2", False)):  # a word that is a token and that no merge makes
        metadata = bpe_metadata(byte_level, pre)
        metadata["tokenizer.ggml.tokens"][599] = "Zqxj"
        metadata["tokenizer.ggml.merges"].pop()
        assert (from_gguf(metadata).encode("Zqxj") == [599]) == whole
    metadata = bpe_metadata(byte_level) | {"tokenizer.ggml.add_bos_token": False}
    assert 0 not in from_gguf(metadata).encode("a", add_special_tokens=True)
    metadata = spm_metadata(spm) | {"tokenizer.ggml.add_space_prefix": False, "tokenizer.ggml.add_bos_token": False}
    tokenizer = from_gguf(metadata)
    assert tokenizer.tokenize("Hello") == ["Hello"]
    assert tokenizer.decode(tokenizer.encode(" Hello", add_special_tokens=True)) == " Hello"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer.ggml.pre": "smolm"}, r"tokenizer.ggml.pre 'smolm' \(did you mean 'smollm'\?\); known are default"),
        ({"tokenizer.ggml.model": "t5"}, "'t5'; known are gpt2, llama"),
        ({"tokenizer.ggml.bos_token_id": 600}, "bos_token has id 600, and there are 600 tokens"),
        ({"tokenizer.ggml.token_type": [1]}, "600 tokens and 1 token types"),
        ({"tokenizer.ggml.model": "llama"}, "no tokenizer.ggml.scores"),
        ({"tokenizer.ggml.model": "llama", "tokenizer.ggml.scores": [0.0] * 600, "tokenizer.ggml.tokens": ["a"] * 600},
         "make no SentencePiece model"),
    ],
)  # fmt: skip
def test_gguf_errors(byte_level, change, message):
    with pytest.raises(ValueError, match=message):
        from_gguf(bpe_metadata(byte_level) | change)
    assert set(SPLITS) >= {"smollm", "llama-bpe", "default", "refact"}


@pytest.mark.parametrize(
    ("name", "content", "style", "message"),
    [
        ("t.model", "", None, "0 bytes"),
        ("t.model", "version https://git-lfs.github.com/spec/v1\n", None, "a pointer of Git LFS"),
        ("t.model", "IQ== 0\nIg== 1\n", None, "2 tiktoken ranks; known are Llama 3's 128000"),
        ("t.model", "IQ== 0\nIg== 1\n", "tiktoken", "lack a single byte"),
        ("t.model", "IQ== 0\nIg= 1\n", "tiktoken", "line 2 is b'Ig= 1'"),
        ("t.model", "\n\x05abc", None, "not a SentencePiece model"),
        ("tokenizer.json", '{"model": {', None, "not a tokenizer.json"),
        ("tokenizer.json", "{}", "hff", r"unknown tokenizer style 'hff' \(did you mean 'hf'\?\)"),
        ("tokenizer.json", "{}", "fms", "style 'fms' has 'char_tokenizer' only"),
    ],
)
def test_files_that_are_no_tokenizers(tmp_path, name, content, style, message):
    write(tmp_path, name, content)
    with pytest.raises(ValueError, match=message):
        get_tokenizer(tmp_path / name, style)


def test_names_that_find_nothing(tmp_path, byte_level):
    with pytest.raises(ValueError, match="did you mean 'char_tokenizer'"):
        get_tokenizer("char_tokeniser")
    with pytest.raises(ValueError, match=f"did you mean '{byte_level}'"):
        get_tokenizer(f"{byte_level}s")
    with pytest.raises(ValueError, match=r"looked for tokenizer.json, tokenizer.model, \*.gguf"):
        get_tokenizer(tmp_path)
    with pytest.raises(ValueError, match=r"looked for tokenizer.model"):
        get_tokenizer(byte_level, "sentencepiece")
    for part in ("a.gguf", "b.gguf"):
        (tmp_path / part).touch()
    with pytest.raises(ValueError, match=r"several \*.gguf: name one of a.gguf, b.gguf"):
        get_tokenizer(tmp_path)


def test_home_directory_and_char_tokenizer(byte_level, monkeypatch):
    monkeypatch.setenv("HOME", str(byte_level.parent))
    assert get_tokenizer(f"~/{byte_level.name}").vocab_size() == 600
    for style in (None, "fms"):
        assert get_tokenizer("char_tokenizer", style).encode("aé€", add_special_tokens=True) == [2, 97, 233, 0]
    with pytest.raises(ValueError, match="single characters, not 'ab'"):
        CharTokenizer().convert_tokens_to_ids("ab")


def test_hub_id_from_the_local_cache(byte_level, tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    cached = tmp_path / "models--org--name"
    shutil.copytree(byte_level, cached / "snapshots" / "abc")
    (cached / "refs").mkdir()
    write(cached / "refs", "main", "abc")
    assert get_tokenizer("org/name").vocab_size() == 600
    with pytest.raises(
        ValueError, match="no tokenizer 'org/other': there is no such file or directory, and the Hub says"
    ):
        get_tokenizer("org/other")


@pytest.mark.slow
def test_smollm2_is_transformers(smollm2, tmp_path):
    transformers = pytest.importorskip("transformers")
    ours = get_tokenizer(smollm2)
    theirs = transformers.AutoTokenizer.from_pretrained(Path(smollm2).parent, gguf_file=Path(smollm2).name)
    ours.save(tmp_path)
    saved = transformers.AutoTokenizer.from_pretrained(tmp_path)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    for text in HARD:
        assert ours.encode(text, add_special_tokens=True) == saved.encode(text)
        assert "".join(streamed(ours, ours.encode(text), skip=False)) == text
        if "½" not in text:  # there transformers leaves out this model's split of digits
            assert ours.encode(text) == theirs.encode(text, add_special_tokens=False)
    for other in (theirs, saved):
        assert (
            ours.apply_chat_template(chat) == other.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
        )
    assert (ours.bos_token_id, ours.eos_token_ids, ours.vocab_size()) == (1, (2,), 49152)
