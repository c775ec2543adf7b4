"""One layer with correlated inputs, for methods that solve a layer-wise problem."""

from __future__ import annotations

import pytest
import torch
from engine_support import IN, OUT
from torch import Tensor


@pytest.fixture
def weight() -> Tensor:
    return torch.randn(OUT, IN, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def inputs() -> Tensor:
    """Five sequences of 32 tokens with correlated features, so that errors move between columns."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(5, 32, IN, generator=generator) @ (
        torch.eye(IN) + 0.3 * torch.randn(IN, IN, generator=generator)
    )
