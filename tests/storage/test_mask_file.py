"""Masks on disk: one bit per weight, the bits by hand, and one-line errors for unreadable files."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import dass_exp
from dass_exp.errors import UserError
from dass_exp.storage.mask_file import PackedMask, iter_masks, load_masks, mask_names, write_masks


def test_the_first_weight_is_the_lowest_bit_and_rows_begin_a_byte():
    keep = torch.tensor([[1, 0, 1, 0, 0, 0, 0, 1, 1], [0, 1, 0, 0, 0, 0, 0, 0, 0]], dtype=torch.bool)
    packed = PackedMask.pack(keep)
    assert packed.bits.tolist() == [[1 + 4 + 128, 1], [2, 0]]
    assert packed.bits.dtype == torch.uint8
    assert packed.columns == 9
    assert torch.equal(packed.unpack(), keep)


@pytest.mark.thorough
@given(st.integers(1, 5), st.integers(1, 33), st.integers(0, 2**30))
def test_unpacking_inverts_packing(rows, columns, seed):
    keep = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) < 0.5
    for mask in (keep, keep.T):  # a view too
        again = PackedMask.pack(mask).unpack()
        assert again.dtype == torch.bool
        assert torch.equal(again, mask)


def test_a_file_gives_the_masks_back_and_takes_a_bit_a_weight(tmp_path):
    generator = torch.Generator().manual_seed(0)
    masks = {f"blocks.{number}.linear": torch.rand(64, 1024, generator=generator) < 0.5 for number in range(4)}
    path = tmp_path / "masks.safetensors"
    write_masks({name: PackedMask.pack(keep) for name, keep in masks.items()}, path)
    loaded = dass_exp.load_masks(path)
    assert loaded.keys() == masks.keys()
    assert all(torch.equal(loaded[name], keep) for name, keep in masks.items())
    assert path.stat().st_size < 4 * 64 * 1024 / 8 + 1500
    assert mask_names(path) == sorted(masks)
    assert [name for name, _ in iter_masks(path, [*masks][::-2])] == [*masks][::-2]
    assert all(bits.dtype == torch.uint8 for bits in load_file(path).values())


@pytest.mark.parametrize("content", [None, b"", b"not safetensors"])
def test_an_unreadable_file_is_a_one_line_error(tmp_path, content):
    path = tmp_path / "masks.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"masks\.safetensors.*(cannot be read|is damaged).*save_masks=true"):
        dass_exp.load_masks(path)


def test_another_safetensors_file_is_refused(tmp_path):
    save_file({"a": torch.ones(2, 2, dtype=torch.bool)}, tmp_path / "masks.safetensors")
    with pytest.raises(UserError, match="holds no packed masks"):
        dass_exp.load_masks(tmp_path / "masks.safetensors")


def test_writing_to_a_missing_folder_raises_an_oserror(tmp_path):
    with pytest.raises(OSError, match=r"masks\.safetensors"):
        write_masks({"a": PackedMask.pack(torch.ones(2, 2, dtype=torch.bool))}, tmp_path / "none" / "masks.safetensors")


@pytest.mark.parametrize("axis", [0, 1])
def test_the_order_of_neurons_is_kept_beside_the_mask(tmp_path, axis):
    dense = torch.rand(6, 10, generator=torch.Generator().manual_seed(0)) < 0.5
    order = torch.randperm(dense.shape[axis], generator=torch.Generator().manual_seed(1))
    reordered = dense.index_select(axis, order)
    plain = PackedMask.pack(dense)
    write_masks({"a.up": PackedMask.pack(reordered, order, axis), "a.o": plain}, tmp_path / "masks.safetensors")
    loaded = dass_exp.load_masks(tmp_path / "masks.safetensors")
    assert loaded.keys() == {"a.up", "a.o"}
    assert torch.equal(loaded["a.up"], reordered)
    assert [torch.equal(keep, dense) for _, keep in iter_masks(tmp_path / "masks.safetensors", ["a.up", "a.o"])] == [
        True,
        True,
    ]


def test_the_masks_of_a_folder_are_those_of_its_file(tmp_path):
    keep = torch.tensor([[True, False]])
    write_masks({"linear": PackedMask.pack(keep)}, tmp_path / "masks.safetensors")
    assert torch.equal(load_masks(tmp_path)["linear"], keep)
