"""BYOL (google-deepmind/deepmind-research, byol), published as pickles of Haiku's parameters."""

from __future__ import annotations

from scaletrain.evals.encoders import haiku, tensorflow_padding
from scaletrain.evals.encoders.layout import Layout

LAYOUT = Layout(prefixes=(haiku.ENCODER,), read=haiku.read, adapt=tensorflow_padding.adapt)
