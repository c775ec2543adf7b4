"""The floor: the forward passes that no calibrated one-shot method can avoid, and nothing else."""

import torch
from torch import Tensor, nn

from dass_exp.engine.attention_replay import AttentionReplay
from dass_exp.engine.capture import capture, eval_mode
from dass_exp.models.decoder import decoder_of


@torch.no_grad()
def run_floor(model: nn.Module, tokens: Tensor, scope: str, batch_size: int) -> None:
    """Run every block once, and each but the last once more, on int64 [sequences, tokens].

    With scope ``mlp`` the second pass replays attention, which pruning does not change.
    """
    decoder = decoder_of(model)
    with eval_mode(model):
        batches = capture(model, list(decoder.blocks), tokens, batch_size)
        for index, block in enumerate(decoder.blocks):
            runs_again = index + 1 < len(decoder.blocks)
            attention = AttentionReplay(decoder.attention(index) if runs_again and scope == "mlp" else None, {})
            with attention.recording():
                for batch in batches:
                    batch.run_block(block, index)
                    attention.batch_done()
            if runs_again:
                with attention.replaying():
                    for batch in batches:
                        batch.hidden = batch.run_block(block, index)
