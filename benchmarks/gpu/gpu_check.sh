#!/usr/bin/env bash
# Checks the project on a machine with a GPU; run it in the repository root. `benchmarks/gpu/__main__.py` says what
# BUDGET, PARTS, DEVICE, TINY, OUT and WORK mean. PYTHON names the interpreter that has PyTorch.
exec "${PYTHON:-python3}" -m benchmarks.gpu
