"""Neurons dealt into groups, by hand."""

from __future__ import annotations

import itertools

import torch

from dass_exp.masks import NM
from dass_exp.models.families import DOWN, GATE
from dass_exp.permute.neurons import Neurons, deal


def test_neurons_are_dealt_there_and_back():
    total = torch.tensor([1.0, 8.0, 3.0, 6.0, 5.0, 4.0, 7.0, 2.0])  # sorted: 1 6 3 4 5 2 7 0
    assert deal(total, 4).tolist() == [1, 4, 5, 0, 6, 3, 2, 7]
    # dealt to two groups: 1 6 | 4 3 (back) | 5 2 | 0 7 (back)
    assert deal(total, 8).tolist() == [1, 6, 3, 4, 5, 2, 7, 0]


def test_each_linear_counts_alike():
    large, small = torch.tensor([[400.0], [300.0], [200.0], [100.0]]), torch.tensor([[0.1], [0.2], [0.3], [0.9]])
    # relative to their means: 1.6 1.2 0.8 0.4 and 0.267 0.533 0.8 2.4; the sums are 1.867 1.733 1.6 2.8
    order = Neurons().order({GATE: large, DOWN: small}, NM(1, 2))
    assert order.tolist() == [3, 2, 0, 1]  # 3 and 0 lead the groups, then back: 2 joins 3? no: 1 joins 0, 2 joins 3


def kept(scores, order, pattern):
    groups = scores[order].view(-1, pattern.m, scores.shape[1])
    return float(groups.sort(1, descending=True).values[:, : pattern.n].sum())


def test_assignment_finds_the_best_exchange_of_a_slot():
    pattern, generator = NM(2, 4), torch.Generator().manual_seed(0)
    for _ in range(5):
        scores = torch.rand(12, 6, generator=generator)
        importance = {DOWN: scores}
        dealt = Neurons().order(importance, pattern)
        improved = Neurons(rounds=1).order(importance, pattern)
        assert kept(scores, improved, pattern) >= kept(scores, dealt, pattern) - 1e-5
        # no permutation of the last slot among the groups is better than the one that was chosen
        groups = improved.view(-1, 4)
        for permuted in itertools.permutations(range(len(groups))):
            other = groups.clone()
            other[:, 3] = groups[list(permuted), 3]
            assert kept(scores, other.reshape(-1), pattern) <= kept(scores, improved, pattern) + 1e-5
