#!/bin/sh
# Generates the Python code of the protos beside each of them. Usage: generate_protos.sh [OUT_DIR]
# (default: proto). Needs the development environment's grpcio-tools and mypy-protobuf on PATH.
set -eu
cd "$(dirname "$0")/.."
out=${1:-proto}
mkdir -p "$out"
find proto -name '*.proto' | LC_ALL=C sort | xargs python3 -m grpc_tools.protoc \
  --proto_path=proto --python_out="$out" --grpc_python_out="$out" \
  --mypy_out="quiet:$out" --mypy_grpc_out="quiet:$out"
find proto/prism -type d ! -name __pycache__ | while read -r directory; do
  : > "$out/${directory#proto/}/__init__.py"
done
