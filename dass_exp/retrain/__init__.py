"""Training of a pruned model after all its blocks were pruned.

In: the pruned model, its masks, token windows, the dense model's last hidden states. Out: the same model with other
surviving weights, its scores on the way, and what became of the masks.
"""
