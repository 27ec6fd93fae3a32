"""ResNets of VISSL (facebookresearch/vissl), as trained (.torch) or converted to torchvision."""

from __future__ import annotations

from scaletrain.evals.encoders.layout import Layout

LAYOUT = Layout(
    prefixes=("_feature_blocks.", "base_model._feature_blocks.", ""),
    nests=(
        ("classy_state_dict", "base_model", "model", "trunk"),
        ("model_state_dict",),
        ("state_dict",),
        (),
    ),
)
