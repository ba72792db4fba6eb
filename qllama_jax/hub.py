"""Names on the Hugging Face hub -> local files, in the hub library's own cache.

`hf://owner/repo/folder/file.gguf` is one file; `owner/repo:Q4_K_M` is the model of the repository
whose name says that quantization. All parts of a split file are fetched: a part's name says how
many there are, so their names need no look at the repository.
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
_PART = re.compile(r"(?P<stem>.*)-(?P<number>[0-9]{5})-of-(?P<count>[0-9]{5})\.gguf")
_NO_MODELS = ("mmproj", "imatrix")  # how the names of files begin that belong to a model
_LISTED = 20  # files that an error names at the most


def is_hub_name(name: str | os.PathLike[str]) -> bool:
    """Whether a name means something on the hub: with `hf://`, or `owner/repo:TAG` if no file."""
    if not isinstance(name, str):
        return False
    return name.startswith(_SCHEME) or (
        _TAGGED.fullmatch(name) is not None and not os.path.exists(name)
    )


def check_no_hub_name(path: str | os.PathLike[str]) -> None:
    """Raise `GGUFError` for a hub name that went through a `Path`, which leaves one slash of two.

    Raises for `hf:/` alone, and only where there is no such file.
    """
    name = os.fsdecode(path)
    if name.startswith("hf:/") and not os.path.exists(name):
        raise GGUFError(f"{name}: no such file; give a name on the hub as a str: hf://, not a Path")


def fetch(name: str) -> Path:
    """Download what a hub name means, unless the cache has it; return the path of the file named.

    That is, for a tag, the model's first part. Progress bars, tokens, the cache and offline mode
    are huggingface_hub's; without the hub a file can be had by its name alone. Raises `GGUFError`
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
            repository, file = single["repository"], single["file"]
        else:
            assert tagged is not None
            repository = tagged["repository"]
            file = _with_tag(name, repository, tagged["tag"], list_repo_files(repository))
        paths = {part: Path(hf_hub_download(repository, part)) for part in _parts(name, file)}
    except (http_error, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise GGUFError(f"{name}: the hub does not give it: {reason[0]}") from error
    return paths[file]


def _parts(name: str, file: str) -> list[str]:
    """Return all files of the model that `file` is, or is a part of."""
    part = _PART.fullmatch(file)
    if part is None:
        return [file]
    number, count = int(part["number"]), int(part["count"])
    if not 1 <= number <= count:
        raise GGUFError(f"{name}: part {number} of {count}, wanted a part in 1..{count}")
    return [f"{part['stem']}-{i:05d}-of-{count:05d}.gguf" for i in range(1, count + 1)]


def _with_tag(name: str, repository: str, tag: str, there: list[str]) -> str:
    """Return the (first) file of the model that has the tag as a word of its own in its name.

    Case counts not, and folders where no file has it. Of several models it is the one to whose
    name those of all others only add words, as `m-UD-Q4_K_M` does to `m-Q4_K_M`.
    """
    word = re.compile(rf"(?<![A-Za-z0-9]){re.escape(tag)}(?![A-Za-z0-9_])", re.IGNORECASE)
    models: dict[tuple[str, str | None], str] = {}  # (stem, number of parts) -> first file there is
    for file in sorted(there):
        if file.endswith(".gguf") and not os.path.basename(file).lower().startswith(_NO_MODELS):
            part = _PART.fullmatch(file)
            stem, count = (part["stem"], part["count"]) if part else (file[: -len(".gguf")], None)
            models.setdefault((stem, count), file)
    found = [model for model in models if word.search(os.path.basename(model[0]))]
    found = found or [model for model in models if word.search(model[0])]
    around = {model: _around(word, model[0]) for model in found}
    plain = [
        model
        for model, (before, after) in around.items()
        if all(b.startswith(before) and a.endswith(after) for b, a in around.values())
    ]
    if len(plain) == 1:
        return models[plain[0]]
    if found:
        listed = _listed([f"hf://{repository}/{models[model]}" for model in found])
        raise GGUFError(f"{name}: {len(found)} models of that name; give one in full: {listed}")
    if models:
        listed = _listed(list(models.values()))
        raise GGUFError(f"{name}: no model of that name; there are {listed}")
    raise GGUFError(f"{name}: no model of that name: the repository has no .gguf file of a model")


def _around(word: re.Pattern[str], stem: str) -> tuple[str, str]:
    """Return what stands before and after the last place of a word in a name, in lower case."""
    *_, last = word.finditer(stem)
    return stem[: last.start()].lower(), stem[last.end() :].lower()


def _listed(files: list[str]) -> str:
    return ", ".join(files[:_LISTED]) + (", ..." if len(files) > _LISTED else "")
