"""Two processes that share the calibration sequences choose the masks of one, on every kind of statistic."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_support import METHODS, prune_blocks
from family_configs import OWN, SHAPE
from test_stages import stages_of
from torch import Tensor, distributed
from transformers import AutoConfig, AutoModelForCausalLM

from dass_exp.errors import UserError
from dass_exp.masks import NM, Unstructured

CASES = [
    ("llama", "dass", (), NM(2, 4)),
    ("llama", "sparsegpt", (), NM(2, 4)),
    ("llama", "glu_wanda", (("permute", "neurons"),), NM(2, 4)),
    ("llama", "wanda", (("refine", "dsnot"),), NM(2, 4)),
    ("llama", "dass", (("repair", "least_squares"),), NM(2, 4)),
    ("llama", "wanda", (("allocation", "owl"),), Unstructured(0.5)),
    ("mixtral", "sparsegpt", (("repair", "least_squares"),), NM(4, 8)),
]


def pruned(number: int) -> tuple[dict[str, Tensor], dict[str, Tensor], list[Any]]:
    """Masks, weights and block errors of a case, by this process."""
    family, name, chosen, pattern = CASES[number]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**SHAPE, **OWN[family]})).eval()
    tokens = torch.randint(SHAPE["vocab_size"], (5, 12), generator=torch.Generator().manual_seed(1))
    method = next(method for method in METHODS if type(method).__module__.endswith(f".{name}"))
    options = {"scope": "all", "batch_size": 2, "stages": stages_of(*chosen), "min_tokens": 1}
    result = prune_blocks(model, tokens, method, pattern, **options)
    errors = [(report.error, [linear.tokens for linear in report.linears]) for report in result.reports]
    return result.masks, copy.deepcopy(model.state_dict()), errors


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    torch.save([pruned(number) for number in range(len(CASES))], f"{folder}/{rank}.pt")
    for wrong, settings in (("repair=block", stages_of(("repair", "block"))), ("1 calibration sequences", None)):
        refuse(wrong, settings)
    distributed.destroy_process_group()


def refuse(message: str, stages: Any) -> None:
    """Both processes refuse what cannot be shared, so that none waits for the other."""
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **{**SHAPE, **OWN["llama"]}))
    tokens = torch.ones(1 if stages is None else 4, 12, dtype=torch.long)
    method = next(method for method in METHODS if method.name == "dass")
    with pytest.raises(UserError, match=message):
        prune_blocks(model, tokens, method, **({} if stages is None else {"stages": stages}))


@pytest.fixture(name="both", scope="module")
def both_fixture(tmp_path_factory) -> list[Any]:
    """What the two processes give for every case."""
    folder = tmp_path_factory.mktemp("parallel")
    torch.multiprocessing.spawn(work, (str(folder),), nprocs=2)
    return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.mark.thorough
@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda number: "-".join(map(str, CASES[number])))
def test_two_processes_choose_the_masks_of_one(number, both):
    masks, weights, errors = pruned(number)
    (first, first_weights, first_errors), (second, second_weights, second_errors) = (each[number] for each in both)
    assert first.keys() == second.keys() == masks.keys()
    for name, mask in masks.items():
        assert torch.equal(first[name], mask), name
        assert torch.equal(second[name], mask), name
    for name, weight in weights.items():
        assert torch.equal(first_weights[name], second_weights[name]), name
        torch.testing.assert_close(first_weights[name], weight, rtol=1e-3, atol=1e-4)
    for (error, tokens), (one, ones), (two, twos) in zip(errors, first_errors, second_errors, strict=True):
        assert tokens == ones == twos
        assert error is None or (one == two == pytest.approx(error, rel=1e-3))
