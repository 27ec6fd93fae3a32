"""SwAV, DeepCluster v2 and SeLa v2 (facebookresearch/swav)."""

from __future__ import annotations

from scaletrain.evals.encoders.layout import Layout

LAYOUT = Layout(
    prefixes=("module.", ""),
    heads=("projection_head.", "prototypes."),
    # Not 0.229: as in their multicropdataset.py and eval_linear.py, so the networks saw this.
    std=(0.228, 0.224, 0.225),
)
