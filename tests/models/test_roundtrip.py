"""Every family: a pruned model saves, reloads, keeps its zeros, and generates the same tokens."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from dass_exp.api import prune
from dass_exp.models.decoder import decoder_of
from dass_exp.models.families import FAMILIES


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_pruned_model_saves_reloads_and_generates(family, tiny_model, tokens, tmp_path):
    model = tiny_model(family)
    prune(model, tokens, "dass", "2:4", scope="all")
    model.generation_config.update(pad_token_id=0, eos_token_id=None, bos_token_id=None)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    before, after = decoder_of(model), decoder_of(again)
    for index in range(len(before.blocks)):
        for site, other in zip(before.sites(index, "all"), after.sites(index, "all"), strict=True):
            assert torch.equal(site.matrix.weight, other.matrix.weight), site.name
            assert (site.matrix.weight == 0).float().mean() == 0.5
    with torch.no_grad():
        torch.testing.assert_close(again(tokens).logits, model(tokens).logits)
    texts = [one.generate(tokens[:1], max_new_tokens=4, do_sample=False) for one in (model, again)]
    assert texts[0].shape[1] == tokens.shape[1] + 4
    assert torch.equal(*texts)
