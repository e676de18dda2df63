#!/bin/sh
# Builds app.wasm, or the file that is named. Needs componentize-py 0.25 (`pip install componentize-py==0.25.1`), as
# COMPONENTIZE_PY says or on the path, and the WIT package of wasi:http 0.2, in the folder that WIT says; without it, the one that
# CloudNexus is built with.
set -eu
output=$(realpath "${1:-app.wasm}")
cd "$(dirname "$0")"
if [ -z "${WIT:-}" ]; then
    find_wit='import json, os, sys
packages = json.load(sys.stdin)["packages"]
print(next(os.path.dirname(p["manifest_path"]) for p in packages if p["name"] == "wasmtime-wasi-http") + "/wit")'
    WIT=$(cargo metadata --locked --format-version 1 --filter-platform "$(rustc -vV | sed -n "s/^host: //p")" \
        --manifest-path ../../Cargo.toml | python3 -c "$find_wit")
fi
# The newest 0.2 that is in it: hosts of CloudNexus take any release of 0.2.
world=$(sed -n 's/.*include \(wasi:http\/proxy@0\.2\.[0-9]*\);.*/\1/p' "$WIT/world.wit")
exec "${COMPONENTIZE_PY:-componentize-py}" --quiet --wit-path "$WIT" --world "$world" componentize app --output "$output"
