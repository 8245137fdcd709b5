#!/usr/bin/env bash
# What a build server runs in a container of python:3.11: install sparse-serve, gate what gate.yaml says.
# SPARSE_SERVE is the address of its repository. Reports go to gate/.
set -euo pipefail

git clone --quiet --depth 1 "$SPARSE_SERVE" .sparse-serve
make --no-print-directory -C .sparse-serve EXTRA=cpu install
exec .sparse-serve/.venv/bin/sparse-serve gate run gate.yaml --out gate
