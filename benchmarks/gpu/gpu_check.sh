#!/usr/bin/env bash
# Checks the project on a machine with a GPU; run it in the repository root. PYTHON names the
# interpreter that has PyTorch; benchmarks/gpu/__main__.py says what BUDGET, PARTS, DEVICE, TINY, OUT,
# WORK and PREPARED mean.
exec "${PYTHON:-python3}" -m benchmarks.gpu
