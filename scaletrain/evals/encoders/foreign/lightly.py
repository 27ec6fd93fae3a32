"""ResNets of lightly (lightly-ai/lightly): the backbone is a ResNet of torchvision, or the list of
its layers.
"""

from __future__ import annotations

from scaletrain.evals.encoders.layout import Layout

_LAYERS = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4"}
LAYOUT = Layout(prefixes=("backbone.", ""), renamed=_LAYERS)
