"""Barlow Twins (facebookresearch/barlowtwins): resnet50.pth and checkpoint.pth."""

from __future__ import annotations

from scaletrain.evals.encoders.layout import Layout

LAYOUT = Layout(prefixes=("module.backbone.", ""))
