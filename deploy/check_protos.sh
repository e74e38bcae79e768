#!/bin/sh
# Fails where the generated code beside the protos is not what the protos say.
set -eu
cd "$(dirname "$0")/.."
fresh=$(mktemp -d)
trap 'rm -rf "$fresh"' EXIT
deploy/generate_protos.sh "$fresh"
if ! diff -r -q -x '*.proto' -x buf.yaml -x __pycache__ proto "$fresh"; then
  echo "the generated code is not current: run make proto" >&2
  exit 1
fi
