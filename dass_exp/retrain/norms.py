"""Train norms and biases only."""

from dataclasses import dataclass

from dass_exp.retrain.base import Retraining


@dataclass
class Norms(Retraining):
    """Train the norms and biases of the decoder, one number a feature; no pruned matrix changes.

    These few parameters recover much of a pruned language model (PERP, arXiv 2312.15230).
    """

    lr: float = 1e-3

    trains_vectors = True
