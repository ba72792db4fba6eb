"""The flags of `qllama generate` and `qllama chat`, named as llama.cpp names them.

Imports nothing that needs jax before it is needed.
"""

from __future__ import annotations

import argparse
import re
import secrets
from typing import Any

#: Fields of `Sampling` that have a flag of their own.
FIELDS = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "typical_p",
    "repeat_penalty",
    "presence_penalty",
    "frequency_penalty",
    "penalty_last_n",
)


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """Add what `read_options` reads, but for --activations."""
    add_whole(parser, "-n --max-new-tokens", 128, "tokens to generate at the most", lo=1)
    _add_float(parser, "--temperature", 0.8, "0 takes the likeliest token")
    add_whole(parser, "--top-k", 40, "keep the K likeliest tokens; 0: all")
    _add_float(parser, "--top-p", 0.95, "keep the likeliest tokens up to this probability; 1: all")
    _add_float(parser, "--min-p", 0.05, "keep tokens this likely, next to the likeliest; 0: all")
    text = "keep the tokens of the most typical likelihood up to this probability; 1: all"
    _add_float(parser, "--typical --typical-p", 1.0, text)
    _add_float(parser, "--repeat-penalty", 1.0, "make recent tokens less likely; 1: not")
    _add_float(parser, "--presence-penalty", 0.0, "take this from the logits of recent tokens")
    text = "take this from the logits of recent tokens for every time they came"
    _add_float(parser, "--frequency-penalty", 0.0, text)
    text = "how many tokens count as recent; 0: none, -1: all"
    add_whole(parser, "--repeat-last-n", 64, text, lo=-1)
    parser.add_argument(
        "-l",
        "--logit-bias",
        type=_bias,
        action="append",
        default=[],
        metavar="ID(+/-)BIAS",
        help="add to the logit of a token, as in 15043+1 or 15043-inf, which bans it; repeatable",
    )
    parser.add_argument(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="end where this text appears, and leave it out; repeatable",
    )
    add_whole(parser, "--seed", None, "of the draws", hi=2**32 - 1)


def read_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return `stream`'s keywords; raises for a parameter out of range, before a model is loaded."""
    from qllama_jax.row_text import stop_strings
    from qllama_jax.sampling import Sampling
    from qllama_jax.sampling_ranges import check_sampling

    flags = {"typical_p": "typical", "penalty_last_n": "repeat_last_n"}
    sampling = {name: getattr(arguments, flags.get(name, name)) for name in FIELDS}
    check_sampling(Sampling(**sampling))
    bias: dict[int, float] = {}
    for token, value in arguments.logit_bias:
        bias[token] = bias.get(token, 0.0) + value
    return sampling | {
        "logit_bias": bias,
        "stop": stop_strings(arguments.stop),
        "max_new_tokens": arguments.max_new_tokens,
        "activations": arguments.activations,
        "dtype": arguments.dtype,
        "seed": secrets.randbelow(2**32) if arguments.seed is None else arguments.seed,
    }


def add_whole(
    parser: argparse.ArgumentParser,
    flags: str,
    default: int | None,
    text: str,
    *,
    lo: int = 0,
    hi: int = 2**31 - 1,
) -> None:
    """Add a flag, or several of one meaning, for an integer in lo..hi."""

    def whole(value: str) -> int:
        if not (re.fullmatch(r"-?[0-9]{1,19}", value) and lo <= int(value) <= hi):
            raise argparse.ArgumentTypeError(f"found {value!r}, wanted an integer in {lo}..{hi}")
        return int(value)

    shown = "random" if default is None else default
    parser.add_argument(
        *flags.split(), type=whole, default=default, metavar="N", help=f"{text} (default: {shown})"
    )


def _add_float(parser: argparse.ArgumentParser, flags: str, default: float, text: str) -> None:
    parser.add_argument(
        *flags.split(),
        type=float,
        default=default,
        metavar="X",
        help=f"{text} (default: {default})",
    )


def _bias(value: str) -> tuple[int, float]:
    number = r"(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?"
    match = re.fullmatch(rf"([0-9]{{1,10}})(\+{number}|-{number}|-inf)", value)
    if match is None:
        wanted = "a token's id and what to add to its logit, as in 15043+1, 15043-0.5, 15043-inf"
        raise argparse.ArgumentTypeError(f"found {value!r}, wanted {wanted}")
    return int(match[1]), float(match[2])
