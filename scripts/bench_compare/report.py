"""Tables and a plot of the results, put between the marks of docs/performance.md."""

from __future__ import annotations

from collections.abc import Sequence

from engines import CANDLE, LLAMA_CPP, MISTRALRS, OURS
from results import Results, Rounds, median, spread

BEGIN, END = "<!-- bench_compare -->", "<!-- end of bench_compare -->"
OLDER = f"{OURS}, older JAX"


def write(results: Results) -> None:
    """Replace what lies between the marks of the Markdown file beside the results."""
    path = results.path.with_suffix(".md")
    text = path.read_text() if path.exists() else f"{BEGIN}\n{END}\n"
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    parts = [about(results), decoding(results), prompts(results), long_and_batch(results)]
    parts += [starting(results), older(results), f"![decoding]({path.with_suffix('.svg').name})"]
    body = "\n\n".join(part for part in parts if part)
    path.write_text(f"{before}{BEGIN}\n{body}\n{END}{after}")
    plot(results)


def about(results: Results) -> str:
    """Machine and versions."""
    versions = ", ".join(results.about["versions"].values())
    known = [n / 1e9 for rows in results.about["bandwidth"].values() for n in rows.values() if n]
    bandwidth = " to ".join(dict.fromkeys(f"{f(known):.1f}" for f in (min, max))) if known else "?"
    return f"{results.about['machine']}; {bandwidth} GB/s of memory; {versions}."


def decoding(results: Results) -> str:
    """Tokens a second, and what share of the memory's bandwidth reads the weights at that rate."""
    lines = []
    measured = [rounds for rows in results.rows.values() for rounds in rows.values()]
    others = [n for n in (CANDLE, MISTRALRS) if any(median(rounds, n) for rounds in measured)]
    for model, rows in results.rows.items():
        sizes = results.about["models"][model]
        for row in ("decode", "decode, int8x2"):
            rounds = rows.get(row, {})
            ours = median(rounds, OURS)
            if ours is None:
                continue
            bandwidth = results.about["bandwidth"][model].get(row)
            share = ours * sizes["step_bytes"] / bandwidth if bandwidth else None
            name = model if row == "decode" else f"{model}, int8x2"
            ratios = [ratio(rounds, OURS, other) for other in others]
            lines.append([name, *beside_llama_cpp(rounds), optional(share, ".2f"), *ratios])
    head = ["tokens/s", "qllama_jax", "llama.cpp", "ratio", "lowest and highest"]
    head += ["of the bandwidth", *(f"to {other}" for other in others)]
    return table(" | ".join(head), lines)


def prompts(results: Results) -> str:
    """Tokens a second of prompts."""
    lines = [
        [model, row.split()[1], *beside_llama_cpp(rounds)]
        for model, rows in results.rows.items()
        for row, rounds in rows.items()
        if row.startswith("prefill")
    ]
    return table(
        "prompt, tokens/s | tokens | qllama_jax | llama.cpp | ratio | lowest and highest", lines
    )


def long_and_batch(results: Results) -> str:
    """Decoding with many positions filled beside few, and of many rows beside one."""
    pairs = {
        "2048 positions filled beside 64": ("decode at 2048", "decode at 64"),
        "4 rows beside one": ("batch of 4", "batch of 1"),
        "8 rows beside one": ("batch of 8", "batch of 1"),
    }
    lines = []
    for model, rows in results.rows.items():
        for name, (many, few) in pairs.items():
            for engine in (OURS, LLAMA_CPP):
                a, b = median(rows.get(many, {}), engine), median(rows.get(few, {}), engine)
                if a is not None and b is not None:
                    lines.append([model, name, engine, number(b), number(a), f"{a / b:.2f}"])
    return table("tokens/s | | engine | few | many | ratio", lines)


def starting(results: Results) -> str:
    """Load, first token, memory."""
    lines = []
    for model, rows in results.rows.items():
        for row in ("load", "first token, cold", "first token, warm"):
            ours, theirs = (median(rows.get(row, {}), engine) for engine in (OURS, LLAMA_CPP))
            if ours is not None:
                lines.append([model, f"{row}, s", f"{ours:.2f}", optional(theirs, ".2f")])
        for row in ("peak memory, loading", "peak memory"):
            ours, theirs = (median(rows.get(row, {}), engine) for engine in (OURS, LLAMA_CPP))
            if ours is not None:
                name = f"{row}, of the file's size"
                lines.append([model, name, f"{ours:.3f}", optional(theirs, ".3f")])
    return table("| | qllama_jax | llama.cpp", lines)


def older(results: Results) -> str:
    """An older JAX beside the newest."""
    lines = []
    for model, rows in results.rows.items():
        for row, rounds in rows.items():
            new, old = median(rounds, OURS), median(rounds, OLDER)
            if new is not None and old is not None:
                lines.append([model, row, number(new), number(old), ratio(rounds, OLDER, OURS)])
    return table("older JAX | | newest | older | ratio", lines)


def beside_llama_cpp(rounds: Rounds) -> list[str]:
    """Medians of both, the ratio, and the rounds' ratios."""
    low_high = spread(rounds, OURS, LLAMA_CPP)
    range_ = "" if low_high is None else f"{low_high[0]:.2f} to {low_high[1]:.2f}"
    pair = [number(median(rounds, engine)) for engine in (OURS, LLAMA_CPP)]
    return [*pair, ratio(rounds, OURS, LLAMA_CPP), range_]


def ratio(rounds: Rounds, engine: str, other: str) -> str:
    """Of two medians."""
    a, b = median(rounds, engine), median(rounds, other)
    return "" if a is None or b is None else f"{a / b:.2f}"


def number(value: float | None) -> str:
    """A rate."""
    return optional(value, ".1f")


def optional(value: float | None, form: str) -> str:
    """Nothing where nothing was measured."""
    return "" if value is None else f"{value:{form}}"


def table(head: str, lines: Sequence[Sequence[str]]) -> str:
    """Markdown; nothing where there are no lines."""
    if not lines:
        return ""
    rule = "|".join(["", *("---" for _ in lines[0]), ""])
    body = [f"| {' | '.join(line)} |" for line in lines]
    return "\n".join([f"| {head} |", rule, *body])


def plot(results: Results) -> None:
    """Draw the rates of decoding and of prompts as multiples of llama.cpp's."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "qllama_jax"  # the same ids each time
    from matplotlib import pyplot as plt

    found: dict[str, list[tuple[str, Rounds]]] = {"decode": [], "prefill 512": []}
    for row, bars in found.items():
        for model, rows in results.rows.items():
            rounds = rows.get(row, {})
            if rounds.get(OURS) and rounds.get(LLAMA_CPP):
                bars.append((model, rounds))
    heights = [max(len(bars), 1) for bars in found.values()]
    figure, axes = plt.subplots(
        2,
        1,
        figsize=(7, 1.2 + 0.32 * sum(heights)),
        gridspec_kw={"height_ratios": heights},
        sharex=True,
        layout="constrained",
    )
    for axis, (row, bars) in zip(axes, found.items(), strict=True):
        for y, (_, rounds) in enumerate(bars):
            base = median(rounds, LLAMA_CPP)
            for engine, color, height in ((OURS, "C0", 0.7), (CANDLE, "C1", 0.25)):
                value = median(rounds, engine)
                if value is not None and base:
                    label = engine if y == 0 and row == "decode" else None
                    axis.barh(y, value / base, height, color=color, label=label)
        axis.set_yticks(range(len(bars)), [model for model, _ in bars])
        axis.invert_yaxis()
        axis.axvline(1, color="black", linewidth=0.8)
        axis.set_title(f"{row}, tokens a second; llama.cpp = 1", fontsize="medium")
    if found["decode"]:
        figure.legend(loc="outside lower center", ncols=2, fontsize="small")
    figure.savefig(results.path.with_suffix(".svg"), metadata={"Date": None})
    plt.close(figure)
