#!/bin/sh
# Print the path of a Python that can hold this project's environment, or say what is missing and exit 1.
#
# A name on PATH proves little: pyenv leaves shims for versions that are not selected, and some builds lack
# ssl or venv. Every candidate is therefore started, and asked for its version and modules.
#
# 3.12 and 3.13 are the versions for which both torch 2.11 and megatron-core 0.19 publish wheels. Another
# version >= 3.12 is taken only when named explicitly: PYTHON=/path/to/python make setup
set -u

MINORS="12 13"

# Prints sys.executable when the candidate will do; otherwise prints nothing and fails.
# $2: the oldest 3.x accepted, $3: the newest.
usable() {
    "$1" - "$2" "$3" 2>/dev/null <<'PY'
import sys
oldest, newest = int(sys.argv[1]), int(sys.argv[2])
if sys.version_info[0] != 3 or not oldest <= sys.version_info[1] <= newest:
    sys.exit(1)
import bz2, ctypes, ensurepip, lzma, ssl, sysconfig, venv, zlib
if sysconfig.get_config_var("Py_GIL_DISABLED") or sys.maxsize < 2**32:
    sys.exit(1)  # no wheels for free-threaded or 32-bit builds
print(sys._base_executable)  # of a virtual environment: what it was made from
PY
}

# One word on why a candidate was passed over, for the closing message.
describe() {
    version=$("$1" -c 'import sys; print("Python %d.%d.%d" % sys.version_info[:3])' 2>/dev/null) ||
        version="does not run"
    echo "    $1: $version"
}

# The candidates for one minor version ($1), most explicit first.
candidates() {
    echo "python3.$1"
    echo python3
    echo python
    for root in "${PYENV_ROOT:-}" "${HOME:-}/.pyenv"; do
        [ -d "$root/versions" ] && ls -d "$root"/versions/*/bin/python3 2>/dev/null
    done
    if command -v uv >/dev/null 2>&1; then
        uv python find --no-project "3.$1" 2>/dev/null
    fi
}

if [ -n "${PYTHON:-}" ]; then
    if found=$(usable "$PYTHON" 12 99) && [ -n "$found" ]; then
        echo "$found"
        exit 0
    fi
    echo "PYTHON=$PYTHON is not usable (needs Python >= 3.12, 64-bit, with ssl, venv, ctypes, bz2, lzma); looking further." >&2
fi

IFS='
'
set -f
for minor in $(echo "$MINORS" | tr ' ' '\n'); do
    for candidate in $(set +f; candidates "$minor"); do
        if found=$(usable "$candidate" "$minor" "$minor") && [ -n "$found" ]; then
            echo "$found"
            exit 0
        fi
    done
done

{
    echo "No usable Python found: 3.12 or 3.13 is needed (64-bit, with ssl, venv, ctypes, bz2, lzma)."
    seen=$(for candidate in $(set +f; candidates 12) python3.13 python3.14; do
        command -v "$candidate" >/dev/null 2>&1 && describe "$candidate"
    done | sort -u)
    [ -n "$seen" ] && printf '  Tried and passed over:\n%s\n' "$seen"
    echo "  Install one, for example: apt install python3.12 python3.12-venv | pyenv install 3.12 | uv python install 3.12"
    echo "  or name it: make setup PYTHON=/path/to/python3.12"
} >&2
exit 1
