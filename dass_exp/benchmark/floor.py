"""The floor: the forward passes that no calibrated one-shot method can avoid, and nothing else."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dass_exp.engine.attention_replay import Attention
from dass_exp.engine.capture import capture, evaluating
from dass_exp.models.decoder import decoder_of


@torch.no_grad()
def run_floor(model: nn.Module, tokens: Tensor, scope: str, batch_size: int) -> None:
    """Run every block once, and each but the last once more, on int64 [sequences, tokens].

    With scope ``mlp`` the second pass replays attention, which pruning does not change.
    """
    decoder = decoder_of(model)
    with evaluating(model):
        batches = capture(model, list(decoder.blocks), tokens, batch_size)
        for index, block in enumerate(decoder.blocks):
            runs_again = index + 1 < len(decoder.blocks)
            attention = Attention(decoder.attention(index) if runs_again and scope == "mlp" else None, {})
            with attention.noting():
                for batch in batches:
                    batch.through(block, index)
                    attention.batch_done()
            if runs_again:
                with attention.replaying():
                    for batch in batches:
                        batch.hidden = batch.through(block, index)
