"""The floor: the forward passes that no calibrated one-shot method can do without, and nothing else."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dass_exp.engine.attention_replay import Attention
from dass_exp.engine.capture import capture, evaluating
from dass_exp.models.decoder import decoder_of


@torch.no_grad()
def passes(model: nn.Module, tokens: Tensor, scope: str, batch_size: int) -> None:
    """Every block once, and once more each block whose output feeds another, through what pruning in ``scope`` would have changed.

    With scope ``mlp`` the second pass takes attention as it came from the first. Nothing is observed, pruned or compared.

    Args:
        model: a transformers causal language model.
        tokens: int64 [sequences, tokens].
        scope: ``mlp``, ``attention`` or ``all``.
        batch_size: sequences that pass through a block together.
    """
    decoder = decoder_of(model)
    with evaluating(model):
        batches = capture(model, list(decoder.blocks), tokens, batch_size)
        for index, block in enumerate(decoder.blocks):
            again = index + 1 < len(decoder.blocks)
            attention = Attention(decoder.attention(index) if again and scope == "mlp" else None, {})
            with attention.noting():
                for batch in batches:
                    batch.through(block, index)
                    attention.batch_done()
            if again:
                with attention.replaying():
                    for batch in batches:
                        batch.hidden = batch.through(block, index)
