#!/usr/bin/env bash
# What a person does who has the README and a CSV file of their own, with columns text and label:
# from nothing to a trained, asked, served and exported delta, in six commands.
#
#   tools/first_hour.sh FILE.csv "A text to ask."     from the root of the repository
#
# INSTALLED=1 leaves out the first command. PORT is that of the server (8000); everything is written to OUT (first-hour).
set -euo pipefail

csv=$(realpath "$1") text=$2 port=${PORT:-8000} out=${OUT:-first-hour} count=0 began=$SECONDS
[ -n "${INSTALLED:-}" ] || PATH="$(realpath -m "${VENV:-.venv}")/bin:$PATH"

run() {
    local started=$SECONDS
    count=$((count + 1))
    printf '\n%d> %s\n' "$count" "$*"
    "$@"
    printf '%d: %d s\n' "$count" "$((SECONDS - started))"
}

[ -n "${INSTALLED:-}" ] || run make install
mkdir -p "$out"
run bertology-serve train --backbone minilm --task classification --train "$csv" --out "$out/deltas/mine"
run bertology-serve ask "$out/deltas/mine" "$text"

count=$((count + 1))
printf '\n%d> bertology-serve serve --backbone minilm --deltas %s --port %s &\n' "$count" "$out/deltas" "$port"
bertology-serve serve --backbone minilm --deltas "$out/deltas" --port "$port" --drain-seconds 0 &
server=$!
trap 'kill $server 2> /dev/null || true' EXIT
run curl -s --retry 30 --retry-connrefused "localhost:$port/predict" -d "{\"delta\": \"mine\", \"text\": \"$text\"}"
kill "$server" && wait "$server" || true
run bertology-serve export --merge "$out/deltas/mine" --out "$out/mine-onnx"

printf '\n%d commands, %d s\n' "$count" "$((SECONDS - began))"
