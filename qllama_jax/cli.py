"""The command line: `qllama generate | chat | info | bench | perplexity`.

Text goes to stdout, all else to stderr. What goes wrong is one line, `qllama: error: ...`, and exit
code 2. This module and those of `info` import nothing that needs jax before it is needed.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from qllama_jax.errors import NumericalError
from qllama_jax.interrupts import exit_at_interrupt
from qllama_jax.sampling_flags import add_sampling, add_whole, read_options

if TYPE_CHECKING:
    from qllama_jax.generate import Piece
    from qllama_jax.load import Model

BAD, INTERRUPTED, NO_READER = 2, 130, 141  # the last two are what a shell says of SIGINT, SIGPIPE
ACTIVATIONS = ("auto", "float", "int8", "int8x2")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code; `--help` and `--version` raise SystemExit(0)."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a foreign character is no reason to stop
    try:
        arguments = _parser().parse_args(argv)
        arguments.run(arguments)
        sys.stdout.flush()
    except KeyboardInterrupt:
        print(file=sys.stderr)  # after the terminal's ^C
        return INTERRUPTED
    except BrokenPipeError:
        # Python flushes stdout once more on its way out, and would complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return NO_READER
    # RuntimeError: jax's own, such as a device that is not there or has no memory left.
    except (ValueError, NumericalError, OSError, MemoryError, RuntimeError) as error:
        _complain(error)
        return BAD
    return 0


def _complain(error: Exception) -> None:
    text = str(error) or type(error).__name__
    shown = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)  # one line, whatever c
    print(f"qllama: error: {shown}", file=sys.stderr)


class _Parser(argparse.ArgumentParser):
    """Raises where argparse would print the usage and exit."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (see {self.prog} --help)")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="qllama", description="Run quantized Llama models from GGUF files.")
    version = sys.modules["qllama_jax"].__version__
    parser.add_argument("--version", action="version", version=f"qllama_jax {version}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(run: Callable[[argparse.Namespace], None], text: str) -> argparse.ArgumentParser:
        name = run.__name__.removeprefix("_")
        added = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        added.add_argument(
            "model",
            metavar="MODEL",
            help="a GGUF file, any part of a split one, an older GGML file, or owner/repo:Q4_K_M",
        )
        added.set_defaults(run=run)
        return added

    generate = command(_generate, "continue a text")
    generate.add_argument("prompt", metavar="PROMPT", help="the text to continue")
    add_sampling(generate)
    generate.add_argument("--ignore-eos", action="store_true", help="go on past the end of text")
    _add_computing(generate)
    _add_dtype(generate)

    chat = command(_chat, "talk to a model; /clear forgets, /exit or end of input ends")
    chat.add_argument("--system", metavar="TEXT", help="what the model is told before all else")
    chat.add_argument("--chat-template", metavar="FILE", help="a Jinja template for the file's own")
    add_sampling(chat)
    _add_computing(chat)
    _add_dtype(chat)

    command(_info, "say what is in a file, without loading it")

    bench = command(_bench, "measure tokens a second, compilation left out")
    add_whole(bench, "-p --prompt-tokens", 128, "tokens of the prompt", lo=1)
    add_whole(bench, "-n --max-new-tokens", 64, "tokens to generate", lo=1)
    bench.add_argument("--json", action="store_true", help="print one line of JSON on stdout")
    _add_computing(bench)
    _add_dtype(bench)

    perplexity = command(_perplexity, "measure how well a model predicts a text, as llama.cpp does")
    perplexity.add_argument("file", metavar="FILE", help="the text, in UTF-8")
    add_whole(perplexity, "-c --context", 512, "tokens of a chunk, its second half scored", lo=4)
    _add_computing(perplexity)
    perplexity.set_defaults(activations="float")
    return parser


def _add_computing(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--activations",
        choices=ACTIVATIONS,
        default="auto",
        help="how activations meet packed weights; auto: what is fastest here"
        " (default: auto; perplexity: float)",
    )
    parser.add_argument(
        "--no-compilation-cache",
        action="store_true",
        help="compile everything anew, and keep nothing compiled on disk",
    )


def _add_dtype(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="of activations and KV cache (default: float32; beside activations that a CPU rounds"
        " to int8 the cache is float16 then)",
    )


def _generate(arguments: argparse.Namespace) -> None:
    options = read_options(arguments)
    model = _load(arguments)
    from qllama_jax.chat import show
    from qllama_jax.generate import stream
    from qllama_jax.progress_bars import bar

    with exit_at_interrupt(INTERRUPTED), bar("prompt") as progress:
        options |= {"ignore_eos": arguments.ignore_eos, "progress": progress}
        last = show(stream(model, arguments.prompt, **options), [])
    print(_closing_line(last, options["seed"]), file=sys.stderr)


def _chat(arguments: argparse.Namespace) -> None:
    options = read_options(arguments)
    file = arguments.chat_template
    model = _load(arguments, None if file is None else Path(file).read_text(encoding="utf-8"))
    from qllama_jax.chat import converse

    def closing_line(last: Piece) -> str:
        return _closing_line(last, options["seed"])

    converse(model, arguments.system, options, closing_line, _complain)


def _info(arguments: argparse.Namespace) -> None:
    from qllama_jax.info import describe
    from qllama_jax.model_file import read_model_file

    for line in describe(read_model_file(arguments.model)):
        print(line)


def _bench(arguments: argparse.Namespace) -> None:
    from qllama_jax.info import by_qtype
    from qllama_jax.model_file import read_model_file

    qtype = next(iter(by_qtype(read_model_file(arguments.model))), "none")
    began = time.perf_counter()
    model = _load(arguments)
    load_seconds = time.perf_counter() - began
    from qllama_jax.bench import measure, table

    with exit_at_interrupt(INTERRUPTED):
        measured = measure(
            model,
            prompt_tokens=arguments.prompt_tokens,
            new_tokens=arguments.max_new_tokens,
            activations=arguments.activations,
            dtype=arguments.dtype,
        )
    report = {"model": model.path.name, "qtype": qtype, "load_s": load_seconds} | measured
    print(table(report), file=sys.stderr if arguments.json else sys.stdout)
    if arguments.json:
        print(json.dumps(report))


def _closing_line(last: Piece, seed: int) -> str:
    stats = last.stats
    assert stats is not None
    return (
        f"prompt: {stats.prompt_tokens} tokens, {stats.prefill_tok_s:.1f} tok/s;"
        f" generated: {stats.generated_tokens} tokens, {stats.decode_tok_s:.1f} tok/s"
        f" (compiling included); finish: {last.finish_reason}; seed: {seed}"
    )


def _perplexity(arguments: argparse.Namespace) -> None:
    text = Path(arguments.file).read_bytes().decode()
    model = _load(arguments)
    from qllama_jax.score import perplexity

    # As llama.cpp's tool does: text that looks like a control token is text.
    tokens = model.tokenizer.encode(text, parse_special=False)
    results = perplexity(
        model, tokens, context=arguments.context, activations=arguments.activations
    )
    with exit_at_interrupt(INTERRUPTED):
        result = None
        for result in results:
            chunks = f"{result.chunks}/{len(tokens) // arguments.context}"
            print(f"chunk {chunks}: {result.value:.4f}", file=sys.stderr)
    assert result is not None  # fewer tokens than a chunk were an error
    print(f"perplexity: {result.value:.4f} +/- {result.error:.4f} ({result.tokens} tokens scored)")


def _load(arguments: argparse.Namespace, chat_template: str | None = None) -> Model:
    """Load the model, with a bar where stderr is a terminal, ready to compile."""
    import jax

    from qllama_jax.compilation_cache import set_compilation_cache
    from qllama_jax.load import load
    from qllama_jax.progress_bars import bar

    set_compilation_cache(not arguments.no_compilation_cache)
    try:
        jax.devices()
    except AssertionError:  # how jax says that it has no plugin for the platform
        raise RuntimeError(f"jax finds no device of {jax.config.jax_platforms!r}") from None

    with bar("loading", is_bytes=True) as progress:
        return load(arguments.model, chat_template=chat_template, progress=progress)
