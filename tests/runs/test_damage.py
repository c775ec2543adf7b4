"""Every file that an interrupted run has left is damaged in turn: the next start names it or gives the same result."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from support import contains, files_under, killed_after_block, listening, run_with, settings_of, tiny_overrides

from dass_exp.errors import DamagedFileError, UserError
from dass_exp.runs.run import run
from dass_exp.storage.durable import write_json

STREAM, RESIDENT = "model.placement=stream", "model.placement=resident"
KINDS = {
    RESIDENT: {"state.safetensors", "block-00000.safetensors", "masks-00000.safetensors"},
    STREAM: {"state.safetensors", "model-00002-of-00003.safetensors", "masks-00000.safetensors"},
}

pytestmark = pytest.mark.usefixtures("short_texts")
both_placements = pytest.mark.parametrize("placement", KINDS)


def settings(tiny, folder, placement):
    return [*tiny_overrides(tiny, folder / "results"), placement, "resume=true", f"save={folder}/saved"]


def flipped(content, position, bit):
    return content[:position] + bytes([content[position] ^ 1 << bit]) + content[position + 1 :]


DAMAGES = {
    **{f"bit {part}/8": lambda path, part=part: flip(path, part) for part in (0, 5, 8)},
    "fifo": lambda path: path.unlink() or os.mkfifo(path),
    "no checksum": lambda path: save_file({name: value.clone() for name, value in load_file(path).items()}, path),
}


def flip(path, part):
    content = path.read_bytes()
    path.write_bytes(flipped(content, min(len(content) - 1, part * len(content) // 8), part % 8))


@pytest.mark.thorough
@both_placements
def test_a_damaged_file_of_an_interrupted_run_is_never_believed(tiny, tmp_path, placement):
    overrides = settings(tiny, tmp_path, placement)
    killed_after_block(0, *overrides)
    config, partial = settings_of(*overrides), tmp_path / ".saved.partial"
    files = files_under(partial)
    assert KINDS[placement] <= {Path(file).name for file in files}
    shutil.copytree(partial, tmp_path / "kept")
    for file in (file for file in files if file.endswith(".safetensors")):
        for damage, apply in DAMAGES.items():
            shutil.rmtree(partial)
            shutil.copytree(tmp_path / "kept", partial)
            apply(partial / file)
            with pytest.raises(DamagedFileError) as caught:
                run(config)
            assert contains(str(caught.value), [str(partial / file), f"remove {partial} to begin again"]), damage
    assert not (tmp_path / "saved").exists()


@pytest.mark.thorough
@both_placements
def test_a_planted_link_is_not_followed(tiny, tmp_path, placement):
    for name in (".saved.partial", ".saved.lock", ".saved.partial/made", ".saved.partial/before", "results/runs"):
        folder, thesis = tmp_path / name.replace("/", "-"), tmp_path / f"thesis of {Path(name).name}"
        thesis.mkdir()
        (thesis / "notes.1.partial").write_text("years of work")
        (folder / name).parent.mkdir(parents=True)
        (folder / name).symlink_to(thesis / "notes.1.partial" if name.endswith("lock") else thesis)
        with pytest.raises(UserError) as caught:
            run_with(
                *settings(tiny, folder, placement), context=listening(on_start=lambda loop: pytest.fail("too late"))
            )
        assert contains(str(caught.value), [str(folder / name), "it is a link"])
        assert files_under(thesis) == ["notes.1.partial"]
        assert (thesis / "notes.1.partial").read_text() == "years of work"


@pytest.mark.thorough
def test_a_linked_work_folder_is_not_followed(cell, results, tmp_path):
    record = run_with(*cell).record
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "notes.1.partial").write_text("mine")
    (results / "runs" / record["key"] / "work").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="work: it is a link"):
        run_with(*cell, "rerun=true")
    assert files_under(tmp_path / "elsewhere") == ["notes.1.partial"]


@pytest.mark.thorough
def test_a_record_with_a_flipped_bit_is_kept_aside_and_made_again(cell, caplog):
    first = run_with(*cell)
    content = first.path.read_bytes()
    position = content.index(b'"perplexity": {') + content[content.index(b'"perplexity": {') :].index(b".") + 1
    first.path.write_bytes(flipped(content, position, 0))
    second = run_with(*cell)
    assert (second.found, second.record["metrics"]) == (False, first.record["metrics"])
    assert len(list(first.path.parent.glob("result.json.damaged-*"))) == 1
    assert f"{first.path}: it is damaged" in caplog.text
    assert run_with(*cell).found


@pytest.mark.thorough
def test_a_record_of_a_later_version_stops_the_run_before_any_work(cell):
    first = run_with(*cell)
    write_json(first.path, {**first.record, "schema": 2})
    for more in ([], ["rerun=true"]):
        with pytest.raises(UserError, match="schema 2"):
            run_with(*cell, *more, context=listening(on_start=lambda loop: pytest.fail("too late")))


@pytest.mark.thorough
def test_damaged_masks_are_named_and_made_again(cell, caplog):
    first = run_with(*cell, "save_masks=true")
    path = first.path.with_name("masks.safetensors")
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    assert run_with(*cell).found  # asks for none
    assert not run_with(*cell, "save_masks=true").found
    assert f"{path}: the masks are damaged" in caplog.text
    assert path.read_bytes() == content  # byte for byte the same each time


@pytest.mark.thorough
def test_what_killed_or_failed_runs_left_beside_a_record_goes_with_the_next_run(cell, results):
    first = run_with(*cell)
    for folder in results.glob("runs/*"):
        for name in ("failed.json", "result.json.77.partial", ".tmpXyZ123"):
            (folder / name).write_text("x")
    assert run_with(*cell).found
    for folder in results.glob("runs/*"):
        assert {path.name for path in folder.iterdir()} == {".lock", "result.json"}
    assert first.path.is_file()
