"""Two records side by side: the overlap of masks by hand, per block and role."""

import torch

from dass_exp.report.compare_two import pair
from dass_exp.report.load import block_of
from dass_exp.storage.mask_file import PackedMask, write_masks

NAMES = {
    "model.layers.0.mlp.gate": "gate",
    "model.layers.0.mlp.down": "down",
    "model.layers.10.mlp.gate": "gate",
    "model.layers.2.mlp.gate": "gate",
}


def record_of(key, masks, tmp_path, names=NAMES):
    folder = tmp_path / "runs" / key
    folder.mkdir(parents=True)
    if masks is not None:
        write_masks(
            {name: PackedMask.pack(torch.tensor([[mark == "1" for mark in bits]])) for name, bits in masks.items()},
            folder / "masks.safetensors",
        )
    layers = [{"name": name, "role": role} for name, role in names.items()]
    return {"key": key, "identity": {"method": key}, "metrics": {}, "protocol": {}, "sparsity": {"layers": layers}}


ONE = dict(zip(NAMES, ["1100", "1010", "1100", "0011"], strict=True))
OTHER = dict(zip(NAMES, ["1010", "1010", "1100", "1100"], strict=True))


def test_the_overlap_is_told_per_block_and_role(tmp_path):
    text = pair(record_of("one", ONE, tmp_path), record_of("other", OTHER, tmp_path), tmp_path)
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.partition("## Masks")[2].splitlines()
        if line.startswith("|")
    ]
    # gate of block 0: 1 of 3; down of block 0: 2 of 2; gate of block 10: 2 of 2; gate of block 2: 0 of 4
    assert rows[0] == ["block", "gate", "down", "all"]
    assert rows[2:] == [
        ["all", "0.3333", "1.0000", "0.4545"],
        ["0", "0.3333", "1.0000", "0.6000"],
        ["2", "0.0000", "", "0.0000"],
        ["10", "1.0000", "", "1.0000"],
    ]


def test_a_record_overlaps_wholly_with_itself(tmp_path):
    record = record_of("one", ONE, tmp_path)
    values = {
        cell.strip()
        for line in pair(record, record, tmp_path).partition("## Masks")[2].splitlines()
        if line[2:3].isdigit()
        for cell in line.split("|")[2:]
    }
    assert values - {""} == {"1.0000"}


def test_masks_that_were_not_kept_are_named(tmp_path):
    text = pair(record_of("one", ONE, tmp_path), record_of("other", None, tmp_path), tmp_path)
    assert "No masks were kept for other: run it again with `save_masks=true`." in text


def test_masks_of_other_linears_have_no_overlap(tmp_path):
    text = pair(
        record_of("one", ONE, tmp_path), record_of("other", {"model.layers.0.mlp.up": "1100"}, tmp_path), tmp_path
    )
    assert "no linear in common" in text


def test_masks_of_another_model_are_told(tmp_path):
    text = pair(
        record_of("one", ONE, tmp_path),
        record_of("other", {**OTHER, "model.layers.0.mlp.gate": "10101010"}, tmp_path),
        tmp_path,
    )
    assert "model.layers.0.mlp.gate has another shape in other" in text


def test_two_scopes_overlap_where_both_have_masks(tmp_path):
    wider = {"model.layers.0.attn.q": "1111", **OTHER}
    first, second = record_of("one", ONE, tmp_path), record_of("other", wider, tmp_path)
    assert (
        pair(first, second, tmp_path).partition("## Masks")[2]
        == pair(first, record_of("same", OTHER, tmp_path), tmp_path).partition("## Masks")[2]
    )


def test_the_block_is_read_from_the_name():
    assert [block_of(name) for name in ("model.layers.12.mlp.gate_proj", "transformer.h.0.mlp.c_fc", "lm_head")] == [
        "12",
        "0",
        "other",
    ]
