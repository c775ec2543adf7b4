"""Masks on disk: one bit a weight, the bits by hand, what cannot be read is one line."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import dass_exp
from dass_exp.errors import UserError
from dass_exp.storage.mask_file import PackedMask, each_mask, mask_names, write_masks


def test_the_first_weight_is_the_lowest_bit_and_rows_begin_a_byte():
    keep = torch.tensor(
        [
            [True, False, True, False, False, False, False, True, True],
            [False, True, False, False, False, False, False, False, False],
        ]
    )
    packed = PackedMask.of(keep)
    assert packed.bits.tolist() == [[1 + 4 + 128, 1], [2, 0]]
    assert packed.bits.dtype == torch.uint8
    assert packed.columns == 9
    assert torch.equal(packed.keep(), keep)


@given(st.integers(1, 5), st.integers(1, 33), st.integers(0, 2**30))
def test_what_is_unpacked_is_what_was_packed(rows, columns, seed):
    keep = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) < 0.5
    again = PackedMask.of(keep).keep()
    assert again.dtype == torch.bool
    assert torch.equal(again, keep)


def test_a_view_is_packed_as_what_it_shows():
    keep = torch.tensor([[True, False, True], [False, True, True]]).T
    assert torch.equal(PackedMask.of(keep).keep(), keep)


def test_a_file_gives_the_masks_back_and_takes_a_bit_a_weight(tmp_path):
    generator = torch.Generator().manual_seed(0)
    masks = {f"blocks.{number}.linear": torch.rand(64, 1024, generator=generator) < 0.5 for number in range(4)}
    path = tmp_path / "masks.safetensors"
    write_masks({name: PackedMask.of(keep) for name, keep in masks.items()}, path)
    found = dass_exp.load_masks(path)
    assert found.keys() == masks.keys()
    assert all(torch.equal(found[name], keep) for name, keep in masks.items())
    assert path.stat().st_size < 4 * 64 * 1024 / 8 + 1500
    assert mask_names(path) == sorted(masks)
    assert [name for name, _ in each_mask(path, [*masks][::-2])] == [*masks][::-2]
    assert all(bits.dtype == torch.uint8 for bits in load_file(path).values())


@pytest.mark.parametrize("content", [None, b"", b"not safetensors"])
def test_what_cannot_be_read_is_told(tmp_path, content):
    path = tmp_path / "masks.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"masks\.safetensors.*cannot be read.*save_masks=true"):
        dass_exp.load_masks(path)


def test_a_file_of_another_make_is_told(tmp_path):
    save_file({"a": torch.ones(2, 2, dtype=torch.bool)}, tmp_path / "masks.safetensors")
    with pytest.raises(UserError, match="holds no packed masks"):
        dass_exp.load_masks(tmp_path / "masks.safetensors")


def test_a_folder_that_is_not_there_is_an_error_of_the_system(tmp_path):
    with pytest.raises(OSError, match=r"masks\.safetensors"):
        write_masks({"a": PackedMask.of(torch.ones(2, 2, dtype=torch.bool))}, tmp_path / "none" / "masks.safetensors")
