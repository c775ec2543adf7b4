"""Train all surviving weights in the scope."""

from dataclasses import dataclass

from dass_exp.retrain.base import Retraining


@dataclass
class Full(Retraining):
    """Train every surviving weight of the linears in the scope; all other parameters of the model stay as they are."""
