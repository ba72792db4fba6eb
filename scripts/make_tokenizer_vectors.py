"""Write tests/data/tokenizer_vectors.json.gz: what llama.cpp's tokenizer gives for 1,000 texts.

    pip install gguf llama-cpp-python==0.3.36
    python scripts/make_tokenizer_vectors.py SmolLM2-135M-Instruct.Q4_1.gguf VOCABS

VOCABS is the folder with llama.cpp's ggml-vocab-*.gguf: vendor/llama.cpp/models in the source
distribution of llama-cpp-python. The texts depend on a fixed seed and on the Unicode version of the
Python that runs this (the committed file: 3.11).

The file holds, as JSON:
    texts           1,000 strings
    vocabularies    name -> ids, by text, with special tokens read as text ("plain"); where reading
                    them as tokens changes that, by index ("special"); by index also with BOS and
                    EOS as the file wants them ("added"); the ids that end a generation ("eog");
                    and SHA-256 digests of the pieces of some 10,000 tokens, each after its
                    length, with special tokens shown and hidden ("pieces")
    pretokenizers   name -> plain ids of the first 300 texts, for gpt-2's vocabulary with
                    another `tokenizer.ggml.pre`
    ties            a small SentencePiece vocabulary with many equal scores: its tokens, types and
                    scores, 300 texts, and their ids without BOS
"""

# ruff: noqa: RUF001 (the texts are of many scripts)
from __future__ import annotations

import argparse
import ctypes
import gzip
import hashlib
import itertools
import json
import random
import sys
import tempfile
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import llama_cpp  # pyright: ignore[reportMissingImports]

COUNT = 1000
PRETOKENIZER_TEXTS = 300
FULL = ("smollm2", "llama-spm", "llama-bpe")
# Name -> how many texts: these vocabularies have .inp/.out vectors too, without special tokens.
OTHERS: dict[str, int] = dict.fromkeys(
    ("phi-3", "qwen2", "falcon", "deepseek-llm", "gpt-2", "refact"), 200
)
# One name for each kind in qllama_jax/tokenizer/pretokenizers.py.
PRETOKENIZERS = (
    *("default", "llama3", "smaug-bpe", "chatglm-bpe", "glm4", "qwen2", "qwen35", "ufakzeka"),
    *("laguna", "gpt-2", "smollm", "falcon", "tekken", "gpt-4o", "granite-embed-multi-97m"),
    *("deepseek-llm", "deepseek-coder", "deepseek-v3", "spark2_5", "youtu", "minicpm5", "jais-2"),
    *("exaone-moe", "bailingmoe", "seed-coder", "superbpe", "bloom", "viking", "chameleon"),
)

SENTENCES = (
    *("Hello, world!", "The quick brown fox jumps over the lazy dog.", "I'll say he's, we've, I'd"),
    *("DON'T SHOUT, IT'S 3 O'CLOCK", "naïve café, Ångström, straße", "¿Dónde está la biblioteca?"),
    *("Zażółć gęślą jaźń", "Příliš žluťoučký kůň", "Съешь же ещё этих мягких булок", "Привет, мир"),
    *(
        "Γειά σου Κόσμε",
        "שלום עולם",
        "مرحبا بالعالم",
        "سلام دنیا، خوبی؟",
        "नमस्ते दुनिया",
        "হ্যালো বিশ্ব",
    ),
    *("வணக்கம் உலகம்", "สวัสดีชาวโลก", "ສະບາຍດີ", "ជំរាបសួរ", "မင်္ဂလာပါ", "გამარჯობა", "Բարեւ աշխարհ"),
    *(
        "你好，世界！今天是2024年。",
        "こんにちは、世界。カタカナ",
        "안녕하세요 세계",
        "ሰላም ልዑል",
        "ᏣᎳᎩ",
    ),
    *("def f(x):\n    return x**2  # squared\n", '{"key": [1, 2.5, null], "t": true}'),
    *("for (int i = 0; i < n; ++i) {\n\tsum += a[i];\n}\r\n", "SELECT * FROM t WHERE a >= 10;"),
    *("https://example.com/a?b=c&d=%20#e", "user@example.org", "C:\\Users\\x\\file.txt"),
    *(
        "1234567890 3.14159 1,000,000 ١٢٣ १२३ Ⅷ ½ ²",
        "$100 €5 £7 ¥900 +1-800-555",
        "a\u00a0b\u2003c",
    ),
    *(
        "🙂👍🏽👩‍👩‍👧‍👦🇩🇪❤️",
        "e\u0301 o\u0308 \u1e9b\u0323",
        "ﬁ ﬂ ǆ ſ K Å",
        "zero\u200bwidth\u200d\ufeff",
    ),
)
SPECIALS = (
    *("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<s>", "</s>", "<unk>", "<|begin_of_text|>"),
    *("<|end_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|user|>"),
    *("<|assistant|>", "<|end|>", "<|system|>", "<0x0A>", "<0xFF>", "▁", "[INST]", "[/INST]"),
    *("<fim_prefix>", "<fim_suffix>", "<reponame>", "<filename>", ">>TITLE<<", ">>ANSWER<<"),
    *("<\uff5cend▁of▁sentence\uff5c>", "<\uff5cUser\uff5c>", "<|im_start", "im_end|>", "<<s>>"),
)
SPACES = (
    " ",
    "  ",
    "   ",
    "\n",
    "\n\n",
    "\r\n",
    "\t",
    " \n",
    "\n ",
    "\t\t",
    "\u3000",
    "\u00a0",
    "\v",
)
SCRIPTS = (
    *((0x20, 0x7E), (0xA0, 0xFF), (0x100, 0x24F), (0x300, 0x36F), (0x370, 0x3FF), (0x400, 0x52F)),
    *((0x590, 0x5FF), (0x600, 0x6FF), (0x900, 0x97F), (0x980, 0x9FF), (0xB80, 0xBFF)),
    *((0xE00, 0xE7F), (0x1000, 0x109F), (0x10A0, 0x10FF), (0x1200, 0x137F), (0x2000, 0x206F)),
    *((0x2190, 0x21FF), (0x2600, 0x27BF), (0x3000, 0x30FF), (0x4E00, 0x9FFF), (0xAC00, 0xD7A3)),
    *((0xFF00, 0xFFEF), (0x1F300, 0x1F64F), (0x1F900, 0x1F9FF), (0x20000, 0x2A6DF)),
)


def assigned(code: int) -> bool:
    """Unassigned code points are left out: which class they are in differs between engines."""
    return unicodedata.category(chr(code)) not in ("Cn", "Cs", "Co")


def pick(rng: random.Random, low: int, high: int) -> str:
    """An assigned character in low..high."""
    while not assigned(code := rng.randint(low, high)):
        pass
    return chr(code)


def of_script(rng: random.Random) -> str:
    """Words of one script."""
    low, high = rng.choice(SCRIPTS)
    words = ("".join(pick(rng, low, high) for _ in range(rng.randint(1, 8))) for _ in range(4))
    return rng.choice(SPACES).join(words)


def of_anything(rng: random.Random) -> str:
    """Any assigned characters, control characters among them."""
    return "".join(
        pick(rng, 0, rng.choice((0x20, 0x7F, 0x2FFF, 0xFFFF, 0x1FFFF))) for _ in range(12)
    )


def of_pieces(rng: random.Random) -> str:
    """Parts of sentences, white space and special tokens in any order."""
    parts = []
    for _ in range(rng.randint(1, 5)):
        sentence = rng.choice(SENTENCES)
        start = rng.randrange(len(sentence))
        parts += [sentence[start : start + rng.randint(1, 20)], rng.choice(SPACES)]
        parts += [rng.choice(SPECIALS)] if rng.random() < 0.6 else []
    return "".join(parts)


def of_ascii(rng: random.Random) -> str:
    """Letters, digits, signs and spaces, all as likely."""
    alphabet = "aeinorstTHE019 '.,-_/(){}[]<>|\"#\\\n\t   "
    return "".join(rng.choice(alphabet) for _ in range(rng.randint(1, 40)))


def of_runs(rng: random.Random) -> str:
    """Runs of one character."""
    runs = [rng.choice(" \n\t=-a01!▁é中🙂") * rng.randint(1, 18) for _ in range(3)]
    return rng.choice(SENTENCES)[:8].join(runs)


def of_forms(rng: random.Random) -> str:
    """A sentence in another normalization form and case."""
    sentence = unicodedata.normalize(
        rng.choice(("NFC", "NFD", "NFKC", "NFKD")), rng.choice(SENTENCES)
    )
    return rng.choice((str.upper, str.lower, str.title, str.swapcase))(sentence)


def make_texts(count: int = COUNT, seed: int = 20261124) -> list[str]:
    """Different texts, shuffled: the first of them are a sample of all kinds."""
    rng = random.Random(seed)
    kinds: tuple[Callable[[random.Random], str], ...] = (
        *(of_script, of_anything, of_pieces, of_pieces, of_ascii, of_runs, of_forms),
    )
    fixed = ["", " ", "\0", *SENTENCES, *SPECIALS, *SPACES, *(f" {s}" for s in SENTENCES[:20])]
    texts = dict.fromkeys(fixed)
    while len(texts) < count:
        texts[rng.choice(kinds)(rng)] = None
    chosen = list(texts)[:count]
    rng.shuffle(chosen)
    return chosen


def sample(size: int) -> list[int]:
    """About 10,000 ids of a vocabulary, and all near its ends, where special tokens are."""
    step = 1 + size // 10_000
    return sorted({*range(0, size, step), *range(300), *range(size - 300, size)})


def pieces_digest(vocab: Any, special: bool) -> str:
    """SHA-256 of tokens' pieces, each after its length in 4 bytes, little-endian."""
    digest = hashlib.sha256()
    buffer = ctypes.create_string_buffer(4096)
    for token in sample(llama_cpp.llama_vocab_n_tokens(vocab)):
        n = llama_cpp.llama_token_to_piece(vocab, token, buffer, len(buffer), 0, special)
        digest.update(n.to_bytes(4, "little") + buffer.raw[:n])
    return digest.hexdigest()


def vectors(model: llama_cpp.Llama, texts: list[str]) -> dict[str, Any]:
    """What the file holds of one vocabulary."""
    vocab = llama_cpp.llama_model_get_vocab(model.model)
    encoded = [text.encode() for text in texts]
    plain = [model.tokenize(text, add_bos=False, special=False) for text in encoded]
    special = [model.tokenize(text, add_bos=False, special=True) for text in encoded]
    return {
        "plain": plain,
        "special": {i: ids for i, ids in enumerate(special) if ids != plain[i]},
        "added": {i: model.tokenize(encoded[i], add_bos=True, special=True) for i in range(20)},
        "eog": [
            token
            for token in range(llama_cpp.llama_vocab_n_tokens(vocab))
            if llama_cpp.llama_vocab_is_eog(vocab, token)
        ],
        "pieces": [pieces_digest(vocab, special) for special in (True, False)],
    }


def load(path: Path, **overrides: str) -> llama_cpp.Llama:
    """The vocabulary of a file, as if its `tokenizer.ggml.*` had other values."""
    keys: Any = {f"tokenizer.ggml.{key}": value for key, value in overrides.items()}
    return llama_cpp.Llama(str(path), vocab_only=True, verbose=False, kv_overrides=keys or None)


def ties(folder: Path) -> dict[str, Any]:
    """Texts of few letters for a vocabulary of their substrings, which have one of three scores."""
    rng = random.Random(1)
    letters = "▁abc"
    grams = ["".join(g) for n in (2, 3, 4) for g in itertools.product(letters, repeat=n)]
    pieces = [*letters, *rng.sample(grams, 120)]
    kinds = {"<unk>": 2, "<s>": 3, "</s>": 3, **{f"<0x{b:02X}>": 6 for b in range(256)}}
    kinds |= dict.fromkeys(pieces, 1)
    scores = [0.0] * 259 + [-float(rng.randint(1, 3)) for _ in pieces]
    path = folder / "ties.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("llama")
    writer.add_token_list(list(kinds))
    writer.add_token_types(list(kinds.values()))
    writer.add_token_scores(scores)
    for key in ("context_length", "embedding_length", "block_count", "feed_forward_length"):
        writer.add_uint32(f"llama.{key}", 64)
    writer.add_uint32("llama.attention.head_count", 1)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    texts = ["".join(rng.choices("abc ", k=rng.randint(1, 30))) for _ in range(300)]
    model = load(path)
    return {
        "tokens": list(kinds),
        "types": list(kinds.values()),
        "scores": scores,
        "texts": texts,
        "ids": [model.tokenize(text.encode(), add_bos=False, special=False) for text in texts],
    }


def main() -> int:
    """Write the file."""
    parser = argparse.ArgumentParser(description="Make the tokenizer's test vectors.")
    parser.add_argument("smollm2", type=Path)
    parser.add_argument("vocabs", type=Path)
    default = Path(__file__).parent.parent / "tests" / "data" / "tokenizer_vectors.json.gz"
    parser.add_argument("-o", "--output", type=Path, default=default)
    args = parser.parse_args()

    texts = make_texts()
    paths = {name: args.vocabs / f"ggml-vocab-{name}.gguf" for name in (*FULL, *OTHERS)}
    paths["smollm2"] = args.smollm2
    vocabularies = {
        name: vectors(load(path), texts[: OTHERS.get(name, COUNT)]) for name, path in paths.items()
    }
    pretokenizers = {}
    for name in PRETOKENIZERS:
        model = load(paths["gpt-2"], pre=name)
        pretokenizers[name] = [
            model.tokenize(text.encode(), add_bos=False, special=False)
            for text in texts[:PRETOKENIZER_TEXTS]
        ]
    with tempfile.TemporaryDirectory() as folder:
        tied = ties(Path(folder))
    document = {
        "made_with": f"llama-cpp-python {llama_cpp.__version__}",
        "texts": texts,
        "vocabularies": vocabularies,
        "pretokenizers": pretokenizers,
        "ties": tied,
    }
    data = json.dumps(document, ensure_ascii=True, separators=(",", ":")).encode()
    # mtime=0: the same content gives the same file.
    args.output.write_bytes(gzip.compress(data, compresslevel=9, mtime=0))
    print(f"{args.output}: {args.output.stat().st_size} bytes", file=sys.stderr)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
