"""Weighted k-nearest-neighbour vote on frozen features (Wu et al., 2018, section 3.4; DINO's
eval_knn.py).

Cosine similarity, each neighbour votes for its class with weight exp(similarity / T). The bank, all
training images, and the queries both go through the test transform.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

from pydantic import AfterValidator, Field
from torch import Tensor

from scaletrain.config.schema import Frozen
from scaletrain.evals.benchmark import Needs
from scaletrain.evals.context import EvalContext
from scaletrain.evals.encoders.targets import Encoder
from scaletrain.evals.features import Features, some
from scaletrain.evals.heads.classifier import finite
from scaletrain.evals.heads.knn import search, votes
from scaletrain.evals.predictions import Ranked, Score, metric_name
from scaletrain.evals.scores import chosen_by


class Config(Frozen):
    ks: Annotated[tuple[Annotated[int, Field(ge=1, le=1_000_000)], ...], AfterValidator(some)] = (
        10,
        20,
        100,
        200,
    )
    temperature: Annotated[float, Field(ge=1e-6)] = 0.07
    """Lower ones would divide the rounding of the similarities by zero."""


def needs(config: Config, encoder: Encoder) -> Needs:
    """All training images and the test images."""
    return Needs(("trainval", "test"))


def measure(config: Config, context: EvalContext) -> Score:
    """Run the benchmark."""
    bank, queries = context.features("trainval"), context.features("test")
    near, where = search(queries.x, finite(bank.x), max(config.ks), context.device)
    voters = bank.labels.to(where.device)[where]

    predictions = {}
    for k in sorted(set(config.ks)):
        class_scores = votes(near, voters, k, config.temperature, context.classes)
        predictions[f"knn_{k}"] = _ranked(context, queries, class_scores)

    # 20 is usually the best
    main = 20 if 20 in config.ks else min(config.ks)
    return Score(
        metric_name(f"knn_{main}", chosen_by(context.dataset.metric)),
        predictions,
        {
            **config.model_dump(mode="json"),
            "similarity": "cosine",
            "vote": "exp(similarity / temperature)",
        },
    )


def _ranked(context: EvalContext, queries: Features, votes: Tensor) -> Ranked:
    """Predictions by votes, where a class without a vote is not predicted at any depth."""
    ranked = context.ranked(queries, votes)
    own = context.dataset.best(votes).gather(1, ranked.labels.unsqueeze(1)).squeeze(1)
    return replace(ranked, rank=ranked.rank.masked_fill(own == 0, ranked.classes))
