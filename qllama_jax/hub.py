"""Names on the Hugging Face hub -> local files, in the hub library's own cache.

`hf://owner/repo/folder/file.gguf` is one file; `owner/repo:Q4_K_M` is the file of the repository
whose name says that quantization. All parts of a split file are fetched.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from qllama_jax.errors import GGUFError

_SCHEME = "hf://"
_REPOSITORY = r"(?P<repository>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)"
_FILE = re.compile(rf"hf://{_REPOSITORY}/(?P<file>.+\.gguf)")
_TAGGED = re.compile(rf"(hf://)?{_REPOSITORY}:(?P<tag>[\w.-]+)")
_PART = re.compile(r"(?P<stem>.*)-\d{5}-of-\d{5}\.gguf")


def is_hub_name(name: str | os.PathLike[str]) -> bool:
    """Whether a name means something on the hub: with `hf://`, or `owner/repo:TAG` if no file."""
    if not isinstance(name, str):
        return False
    return name.startswith(_SCHEME) or (
        _TAGGED.fullmatch(name) is not None and not os.path.exists(name)
    )


def fetch(name: str) -> Path:
    """Download what a hub name means, unless the cache has it; return the (first part's) path.

    Progress bars, tokens, the cache and offline mode are huggingface_hub's. Raises `GGUFError`
    naming what was asked for where there is no such repository or file, or more than one.
    """
    from huggingface_hub import hf_hub_download, list_repo_files
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    # Under HfHubHTTPError lies the error of the HTTP client, which has been another one before.
    http_error: Any = HfHubHTTPError.__mro__[1]
    single, tagged = _FILE.fullmatch(name), _TAGGED.fullmatch(name)
    if single is None and tagged is None:
        raise GGUFError(f"{name}: wanted hf://owner/repo/file.gguf or owner/repo:QUANTIZATION")
    try:
        if single is not None:
            repository, files = single["repository"], [single["file"]]
            if _PART.fullmatch(single["file"]):
                files = _all_parts(single["file"], list_repo_files(repository))
        else:
            assert tagged is not None
            repository = tagged["repository"]
            files = _with_tag(name, tagged["tag"], list_repo_files(repository))
        paths = [Path(hf_hub_download(repository, file)) for file in files]
    except (http_error, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise GGUFError(f"{name}: the hub does not give it: {reason[0]}") from error
    return paths[0]


def _all_parts(file: str, there: list[str]) -> list[str]:
    stem = _stem(file)
    return sorted(other for other in there if _PART.fullmatch(other) and _stem(other) == stem)


def _with_tag(name: str, tag: str, there: list[str]) -> list[str]:
    """Files of the one model whose name has the tag as a word of its own, whatever its case."""
    word = re.compile(rf"(?<![A-Za-z0-9]){re.escape(tag)}(?![A-Za-z0-9_])", re.IGNORECASE)
    models = sorted(file for file in there if file.endswith(".gguf"))
    found = [file for file in models if word.search(os.path.basename(_stem(file)))]
    stems = sorted({_stem(file) for file in found})
    if len(stems) != 1:
        listed = ", ".join(stems or models[:20]) or "no .gguf file"
        raise GGUFError(f"{name}: {len(stems)} files of that name; there are {listed}")
    return found


def _stem(file: str) -> str:
    part = _PART.fullmatch(file)
    return part["stem"] if part else file.removesuffix(".gguf")
