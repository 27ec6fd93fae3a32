"""MoCo v1 and v2 (facebookresearch/moco), and MoCo v3 with a ResNet (facebookresearch/moco-v3)."""

from __future__ import annotations

from scaletrain.evals.encoders.layout import Layout

# the online encoder, not the momentum encoder
LAYOUT = Layout(prefixes=("module.encoder_q.", "module.base_encoder."))
