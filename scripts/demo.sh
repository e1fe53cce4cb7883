#!/usr/bin/env bash
# Sets up .venv, converts the embedded SmolLM2-135M with a measured schedule, and generates from its packed cache.
# Usage: bash scripts/demo.sh [OUTPUT_DIR]
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh

output=${1:-build/smollm2-135m-tq3}
if [ -f "$output/config.json" ]; then
    echo "$output is there already: generating from it (remove it to convert again)"
else
    python scripts/convert.py smollm2-135m --schedule auto --output-dir "$output"
fi
python scripts/generate.py "$output" --sample --max-new-tokens 300 --prompt "Once upon a time, a lighthouse keeper found a letter."
