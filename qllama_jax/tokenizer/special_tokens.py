"""Which tokens are special: types, and the set that ends a generation, as llama.cpp decides them.

A GGUF file names few of its special tokens by key, and types some of them wrongly, so llama.cpp
also goes by their texts: tokens that look like control tokens are control tokens. The texts and the
order of the rules are those of `llama_vocab::impl::load` in its src/llama-vocab.cpp.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum

from qllama_jax.metadata import Metadata


class TokenType(IntEnum):
    """Values of `tokenizer.ggml.token_type`."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


#: Types whose text is cut out of the input, longest first, before it is merged.
SPLIT_TYPES = frozenset({TokenType.UNKNOWN, TokenType.CONTROL, TokenType.USER_DEFINED})
#: Of those, the types that text may spell only with `parse_special`, and that decoding can hide.
HIDDEN_TYPES = frozenset({TokenType.UNKNOWN, TokenType.CONTROL})

_END_OF_GENERATION = (
    *("<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>"),
    *("<end_of_turn>", "<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]"),
    *("<|end_of_text|>", "<end_of_utterance>", "<eos>", "<turn|>", "<|tool_response>"),
    *("<\uff5cend▁of▁sentence\uff5c>", "[e~["),
)
_ALWAYS_SHOWN = ("<|channel|>", "<|message|>", "<|start|>", "<|constrain|>")

# Fill-in-the-middle tokens: keys of their ids (the second one deprecated), texts where no key is.
_FILL_IN: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "pre": (
        ("fim_pre_token_id", "prefix_token_id"),
        (
            *("<|fim_prefix|>", "<fim-prefix>", "<fim_prefix>", "<\uff5cfim▁begin\uff5c>"),
            *("<PRE>", "▁<PRE>", "<|code_prefix|>", "<|prefix|>"),
        ),
    ),
    "suf": (
        ("fim_suf_token_id", "suffix_token_id"),
        (
            *("<|fim_suffix|>", "<fim-suffix>", "<fim_suffix>", "<\uff5cfim▁hole\uff5c>"),
            *("<SUF>", "▁<SUF>", "<|code_suffix|>", "<|suffix|>"),
        ),
    ),
    "mid": (
        ("fim_mid_token_id", "middle_token_id"),
        (
            *("<|fim_middle|>", "<fim-middle>", "<fim_middle>", "<\uff5cfim▁end\uff5c>"),
            *("<MID>", "▁<MID>", "<|code_middle|>", "<|middle|>"),
        ),
    ),
    "pad": (
        ("fim_pad_token_id",),
        ("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"),
    ),
    "rep": (
        ("fim_rep_token_id",),
        ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"),
    ),
    "sep": (("fim_sep_token_id",), ("<|file_sep|>",)),
}
_FILL_IN_ENDS = ("pad", "rep", "sep")


def token_id(metadata: Metadata, name: str, size: int, default: int | None = None) -> int | None:
    """`tokenizer.ggml.{name}`, else `default` where the vocabulary of `size` has such an id.

    Raises GGUFError where the file's id is not in 0..size-1.
    """
    if default is not None and default >= size:
        default = None
    return metadata.get_uint(f"tokenizer.ggml.{name}", default, hi=size - 1)


def resolve_types(
    metadata: Metadata, ids: Mapping[str, int], types: list[TokenType], eos_id: int | None
) -> frozenset[int]:
    """Correct `types` in place by the tokens' texts; the ids that end a generation.

    Raises GGUFError where the file gives a special token an id outside the vocabulary.
    """
    # Files in circulation have padding ids and the like out of range; nothing reads them.
    ends = {_fill_in(metadata, ids, types, name) for name in _FILL_IN} - {None}
    fixed = {token_id(metadata, f"{name}_token_id", len(ids)) for name in ("eot", "eom")}
    for text in _END_OF_GENERATION:
        if text in ids:
            types[ids[text]] = TokenType.CONTROL
            ends.add(ids[text])
    for text in _ALWAYS_SHOWN:
        if text in ids:
            types[ids[text]] = TokenType.USER_DEFINED
    ends |= {eos_id, *fixed} - {None}
    _exempt(ids, types, ends)
    return frozenset(end for end in ends if end is not None)


def _fill_in(
    metadata: Metadata, ids: Mapping[str, int], types: list[TokenType], name: str
) -> int | None:
    """Id of a fill-in-the-middle token that ends a generation, None for the others."""
    keys, texts = _FILL_IN[name]
    found = None
    for key in keys:
        found = token_id(metadata, key, len(ids), found)
    if found is None:
        # llama.cpp takes the first in the order of a hash table; here it is the order of the list.
        found = next((ids[text] for text in texts if text in ids), None)
        if found is not None:
            types[found] = TokenType.CONTROL
    return found if name in _FILL_IN_ENDS else None


def _exempt(ids: Mapping[str, int], types: list[TokenType], ends: set[int | None]) -> None:
    """Two families of models use a text of the list inside a generation: take it out of `ends`."""
    end_texts = {text for text in ids if ids[text] in ends}
    calls = end_texts & {"<|call|>", "<|calls|>"}
    if "<|end|>" in end_texts and calls and end_texts & {"<|return|>", "<|flush|>"}:
        ends.discard(ids["<|end|>"])
        types[ids["<|end|>"]] = TokenType.USER_DEFINED
    if "</s>" in end_texts and end_texts & {"<|tool_response>", "<|plamo:eos|>"}:
        ends.discard(ids["</s>"])
        types[ids["</s>"]] = TokenType.NORMAL
