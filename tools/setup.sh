#!/bin/sh
# Make .venv with the package and its extras in it, or return at once when that is already done.
#
#   EXTRAS=dev,bench tools/setup.sh           other extras (default: dev)
#   PYTHON=/path/to/python3.13 tools/setup.sh this Python (default: see find_python.sh)
#
# `.venv/.installed` says what was installed: this folder, the interpreter, the extras, and a digest of
# pyproject.toml and requirements/. It is removed before an install and written after; an install that
# was killed leaves `.venv/.installing` behind, and then everything is made anew.
set -eu
cd "$(dirname "$0")/.."
root=$(pwd -P)
extras=${EXTRAS:-dev}
stamp=.venv/.installed

# Version and home of an interpreter; empty when it does not run, as after its pyenv version was removed.
identity() {
    "$1" -c 'import sys; print("%d.%d.%d %s" % (*sys.version_info[:3], sys.base_prefix))' 2>/dev/null || true
}
wanted() {
    printf '%s\n%s\n%s\n' "$root" "$(identity .venv/bin/python)" "$extras"
    cat pyproject.toml requirements/*.txt | cksum
}
# pip answers last when an environment is made, and with its path: an environment moved or copied from
# another folder answers with the other one.
venv_is_whole() {
    [ ! -e .venv/.installing ] || return 1
    case "$(identity .venv/bin/python)" in 3.1[2-9].*) ;; *) return 1 ;; esac
    case "$(.venv/bin/pip --version 2>/dev/null)" in *" $root/.venv/"*) ;; *) return 1 ;; esac
}

python=
if [ -n "${PYTHON:-}" ] || ! venv_is_whole; then
    python=$(tools/find_python.sh)
fi
if ! venv_is_whole || { [ -n "$python" ] && [ "$(identity "$python")" != "$(identity .venv/bin/python)" ]; }; then
    echo "Making .venv with $python ($("$python" --version))"
    rm -f .venv/bin/python* "$stamp"  # first, so that a removal cut short is not taken for an environment
    rm -rf .venv
    "$python" -m venv .venv
fi
if [ "$(wanted)" = "$(cat "$stamp" 2>/dev/null)" ]; then
    exit 0
fi

echo "Installing the package with [$extras]: PyTorch with CUDA is about 3 GB to fetch; minutes the first time"
rm -f "$stamp"
: > .venv/.installing
if ! .venv/bin/python -m pip install --disable-pip-version-check --no-input \
    -c requirements/constraints.txt -e ".[$extras]"; then
    rm -f .venv/.installing  # pip failed by itself, and puts back what it had replaced
    exit 1
fi
case ",$extras," in *,dev,*)
    # With --target pip looks at nothing that is installed, and a folder that is there would keep old files.
    rm -rf .venv/transformer_engine_python
    if ! .venv/bin/python -m pip install --disable-pip-version-check --no-input --no-deps \
        --target .venv/transformer_engine_python -r requirements/transformer_engine_python.txt; then
        rm -f .venv/.installing
        exit 1
    fi ;;
esac
.venv/bin/python -c 'import torch, megatron_groupdpo'
rm -f .venv/.installing
wanted > "$stamp.part"
mv "$stamp.part" "$stamp"
echo "Ready: $root/.venv/bin/python"
