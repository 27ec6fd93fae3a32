"""The whole network of a run, rebuilt from its configuration and checkpoint, for benchmarks that
score what it predicts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scaletrain.checkpoint import files
from scaletrain.config import load as configuration
from scaletrain.config.schema import Config
from scaletrain.core import Method
from scaletrain.evals.encoders import targets
from scaletrain.train.build import rebuild
from scaletrain.train.weight_sources import METHOD


@dataclass(frozen=True)
class Network:
    """The method of a saved step, with its weights."""

    # in evaluation mode, on the CPU
    method: Method
    config: Config
    # what the checkpoint records of its training
    meta: Mapping[str, Any]
    # sha256 of all weights, heads included
    weights: str

    @property
    def identity(self) -> dict[str, Any]:
        """The identity in results."""
        # without the place of the weights that it started from, which are in the digest
        options = self.config.method.model_dump(mode="json", exclude={"source"})
        return {"network": self.weights, "method": options}

    @property
    def trained_on(self) -> set[str]:
        """sha256 of the data sets of its training, as far as the checkpoint records them."""
        data = self.meta.get("data") or {}
        return {source["sha256"] for source in data.get("sources", ()) if source.get("sha256")}

    @property
    def pretrained_on(self) -> set[str]:
        """The same of the runs that its modules came from."""
        origins = (self.meta.get("initial_weights") or {}).values()
        return {sha256 for origin in origins for sha256 in origin.get("data", ())}


def load(target: Path) -> Network:
    """The network of RUN (its newest good checkpoint) or RUN/checkpoints/step-N. Raises EvalError,
    ConfigError, CheckpointError or TrainingError.
    """
    # `step-N` alone has no parent
    target = target.absolute()
    saved = targets.step_of(target, METHOD)
    config = configuration.load(targets.run_of(target) / "config.yaml")
    method = rebuild(config, saved)

    return Network(method, config, saved.meta, files.fingerprint(method.state_dict(), {}))
