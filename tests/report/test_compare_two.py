"""Two records side by side: what differs, paired scores, and the overlap of masks by hand, per block and role."""

import pytest
import torch
from factory import diverged, record_of, task, write_record

from dass_exp.report.compare_two import compare_records
from dass_exp.report.load import block_of
from dass_exp.storage.mask_file import PackedMask, write_masks

ROLES = {
    "model.layers.0.mlp.gate": "gate",
    "model.layers.0.mlp.down": "down",
    "model.layers.10.mlp.gate": "gate",
    "model.layers.2.mlp.gate": "gate",
}
FIRST = dict(zip(ROLES, ["1100", "1010", "1100", "0011"], strict=True))
SECOND = dict(zip(ROLES, ["1010", "1010", "1100", "1100"], strict=True))


def masked(key, masks, results):
    """A record with the masks of its linears, a row of bits each."""
    record = record_of("wanda", key=key)
    record["sparsity"]["layers"] = [{"name": name, "role": role} for name, role in ROLES.items()]
    folder = write_record(record, results).parent
    if masks is not None:
        bits = {name: torch.tensor([[bit == "1" for bit in row]]) for name, row in masks.items()}
        write_masks({name: PackedMask.pack(keep) for name, keep in bits.items()}, folder / "masks.safetensors")
    return record


def overlap(first, second, results):
    """The section about masks of a comparison, and the cells of its table."""
    text = compare_records(first, second, results).partition("## Masks")[2]
    lines = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    return text, [[cell.strip() for cell in line] for line in lines]


def test_settings_and_paired_scores(results):
    first, second = record_of("wanda", [5.0, 6.0, 7.0], key="one"), record_of("dass", [4.0, 5.0, 6.0], key="two")
    text = compare_records(first, second, results)
    assert "| method.class | wanda | dass |" in text
    assert "| nats per token wikipedia_mini | 6.0000 | 5.0000 | +1.0000 | +1.0000 to +1.0000 |" in text
    assert "No masks were kept for one and two" in text


def test_divergence_and_answers_that_differ(results):
    records = []
    for key, kl, right in (("one", 0.25, [1.0, 1.0, 0.0, 0.0]), ("two", 0.5, [0.0, 1.0, 1.0, 1.0])):
        record = record_of("wanda", key=key, tasks={"piqa": task(sum(right) / 4) | {"bits_per_byte": kl}})
        records.append(diverged(record, [kl, kl], [0.5, 0.5], 2.0))
        write_record(record, results, {"piqa": {"acc": right, "bits_per_byte": [kl] * 4}})
    text = compare_records(*records, results)
    assert "| kl wikipedia_mini | 0.2500 | 0.5000 | -0.2500 | -0.2500 to -0.2500 |" in text
    assert "| agreement wikipedia_mini | 0.5000 | 0.5000 | +0.0000 | +0.0000 to +0.0000 |" in text
    assert "| piqa bits_per_byte | 0.2500 | 0.5000 | -0.2500 | -0.2500 to -0.2500 |" in text
    assert "| task | documents | only one is right, % | only two is right, % |" in text
    assert "| piqa | 4 | 25.0 | 50.0 |" in text


def test_the_overlap_of_masks_by_block_and_role(results):
    _, rows = overlap(masked("one", FIRST, results), masked("two", SECOND, results), results)
    # gate of block 0: 1 of 3; down of block 0: 2 of 2; gate of block 10: 2 of 2; gate of block 2: 0 of 4
    assert rows[0] == ["block", "gate", "down", "all"]
    assert rows[2:] == [
        ["all", "0.3333", "1.0000", "0.4545"],
        ["0", "0.3333", "1.0000", "0.6000"],
        ["2", "0.0000", "", "0.0000"],
        ["10", "1.0000", "", "1.0000"],
    ]


def test_a_record_overlaps_wholly_with_itself(results):
    record = masked("one", FIRST, results)
    _, rows = overlap(record, record, results)
    assert {value for row in rows[2:] for value in row[1:]} - {""} == {"1.0000"}


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        (None, "No masks were kept for two: run it again with `save_masks=true`."),
        ({"model.layers.0.mlp.up": "1100"}, "no linear in common"),
        ({**SECOND, "model.layers.0.mlp.gate": "10101010"}, "model.layers.0.mlp.gate has another shape in two"),
    ],
)
def test_masks_that_cannot_be_compared(results, masks, message):
    text, rows = overlap(masked("one", FIRST, results), masked("two", masks, results), results)
    assert message in text
    assert rows == []


def test_two_scopes_overlap_where_both_have_masks(results):
    first, second = masked("one", FIRST, results), masked("two", SECOND, results)
    wider = masked("wider", {"model.layers.0.attn.q": "1111", **SECOND}, results)
    assert overlap(first, wider, results) == overlap(first, second, results)


@pytest.mark.parametrize(
    ("name", "block"),
    [("model.layers.12.mlp.gate_proj", "12"), ("transformer.h.0.mlp.c_fc", "0"), ("lm_head", "other")],
)
def test_the_block_is_read_from_the_name(name, block):
    assert block_of(name) == block
