"""VICReg (facebookresearch/vicreg): resnet50.pth, resnet50x2.pth, resnet200x2.pth, model.pth."""

from __future__ import annotations

from scaletrain.evals.encoders.layout import Layout

LAYOUT = Layout(prefixes=("module.backbone.", "backbone.", ""))
