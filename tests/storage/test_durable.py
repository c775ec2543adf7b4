"""Files that are read again: complete or absent, checked, with the user's permissions, and never through a link."""

from __future__ import annotations

import errno
import json
import os
import stat
import uuid

import pytest
import torch
from safetensors.torch import save_file
from support import bare_record, contains, files_under

from dass_exp.errors import DamagedFileError, NewerRecordError, UserError, os_error_line
from dass_exp.report.load import load
from dass_exp.storage.durable import read_json, refuse_links, remove_partial_files, write_json, write_text
from dass_exp.storage.mask_file import PackedMask, load_masks, write_masks
from dass_exp.storage.record_schema import SCHEMA
from dass_exp.storage.records import RecordStore, read_record
from dass_exp.storage.tensor_file import read_tensors, write_tensors

KEY = "0123456789abcdef"
TENSORS = {
    "a": torch.arange(6.0).view(2, 3),
    "b": torch.tensor([True, False]),
    "c": torch.ones(3, dtype=torch.bfloat16),
}


def as_lists(tensors):
    return {name: (str(tensor.dtype), tensor.tolist()) for name, tensor in tensors.items()}


def write_three_tensors(path):
    write_tensors(TENSORS, path, {"about": "three tensors"})


def read_three_tensors(path):
    tensors, metadata = read_tensors(path)
    return as_lists(tensors), metadata


def write_a_mask(path):
    write_masks({"linear": PackedMask.pack(torch.eye(9, dtype=torch.bool))}, path)


def write_a_record(path):
    RecordStore(path.parents[2]).write(bare_record(path.parent.name), {})


KINDS = {  # how each kind of file is written and read again
    "x.safetensors": (write_three_tensors, read_three_tensors),
    "masks.safetensors": (write_a_mask, lambda path: as_lists(load_masks(path))),
    "x.json": (lambda path: write_json(path, {"text": "é", "numbers": [1.5, 2], "none": None}), read_json),
    f"runs/{KEY}/result.json": (write_a_record, read_record),
}
every_kind = pytest.mark.parametrize("name", KINDS)


@pytest.mark.thorough
@every_kind
def test_no_flipped_bit_is_believed(name, tmp_path):
    path, (write, read) = tmp_path / name, KINDS[name]
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path)
    content, expected = path.read_bytes(), read(path)
    refused = 0
    for position in range(len(content)):
        path.write_bytes(content[:position] + bytes([content[position] ^ 1 << position % 8]) + content[position + 1 :])
        try:
            assert read(path) == expected or name.endswith(".json")  # the name of the checksum itself, which is lost
        except UserError as error:
            assert contains(str(error), [str(path)])
            refused += 1
    assert refused > 0.8 * len(content)


@every_kind
def test_a_file_that_was_cut_is_named(name, tmp_path):
    path, (write, read) = tmp_path / name, KINDS[name]
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path)
    content = path.read_bytes()
    for length in range(0, len(content) - 2, 7):
        path.write_bytes(content[:length])
        with pytest.raises(DamagedFileError, match=str(path)):
            read(path)


def make_loop(path):
    path.symlink_to(path.name)


UNUSUAL = {
    "fifo": os.mkfifo,
    "folder": os.mkdir,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "dangling link": lambda path: path.symlink_to("nowhere"),
    "looping link": make_loop,
}


@every_kind
@pytest.mark.parametrize("what", UNUSUAL)
def test_what_is_no_file_is_named_and_nothing_waits_for_it(name, what, tmp_path):
    path, (_, read) = tmp_path / name, KINDS[name]
    path.parent.mkdir(parents=True, exist_ok=True)
    UNUSUAL[what](path)
    with pytest.raises((OSError, UserError), match=str(path)):
        read(path)


def test_tensors_without_a_checksum_are_refused_where_one_is_required(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file(TENSORS, path)
    assert as_lists(read_tensors(path, required=False)[0]) == as_lists(TENSORS)
    with pytest.raises(DamagedFileError, match="wrote no checksum"):
        read_tensors(path)


@pytest.mark.parametrize(("mask", "mode"), [(0o077, 0o600), (0o022, 0o644), (0o002, 0o664)])
def test_files_have_the_permissions_that_the_umask_gives(tmp_path, mask, mode):
    before = os.umask(mask)
    try:
        write_three_tensors(tmp_path / "x.safetensors")
        write_json(tmp_path / "x.json", {})
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {mode}
    assert files_under(tmp_path) == ["x.json", "x.safetensors"]


def test_only_scratch_files_of_killed_writers_are_removed_and_no_link_is_followed(tmp_path):
    ours, elsewhere = tmp_path / "ours", tmp_path / "elsewhere"
    scratch = [
        f"result.json.{uuid.uuid4().hex}.partial",
        "result.json.77.partial",
        ".tmpXyZ123",
        "masks.safetensors.partial",
    ]
    for folder in (ours, ours / "deep", elsewhere):
        folder.mkdir()
        for name in (*scratch, "mine.partial", ".tmp", ".tmp-notes.txt", "result.json"):
            (folder / name).write_text("x")
    (ours / "link").symlink_to(elsewhere)
    (ours / ".tmpAbC456").symlink_to(elsewhere / "mine.partial")
    theirs = files_under(elsewhere)
    remove_partial_files(ours)
    remove_partial_files(ours / "link")
    assert files_under(elsewhere) == theirs
    assert {path.name for path in (ours / "deep").iterdir()} == {
        "mine.partial",
        ".tmp",
        ".tmp-notes.txt",
        "result.json",
    }


def test_a_link_below_the_root_is_refused_and_the_root_may_be_one(tmp_path):
    (tmp_path / "real" / "runs").mkdir(parents=True)
    (tmp_path / "results").symlink_to("real")
    (tmp_path / "real" / "runs" / KEY).symlink_to(tmp_path)
    refuse_links(tmp_path / "results" / "runs", tmp_path / "results")
    for path in (tmp_path / "results" / "runs" / KEY, tmp_path / "results" / "runs" / KEY / "work" / "x"):
        with pytest.raises(UserError) as caught:
            refuse_links(path, tmp_path / "results")
        assert contains(str(caught.value), [f"{tmp_path}/results/runs/{KEY}: it is a link"])


def test_writing_replaces_a_link_and_leaves_what_it_leads_to(tmp_path):
    (tmp_path / "thesis").write_text("years of work")
    for name, write in (("x.json", lambda path: write_json(path, {})), ("x.safetensors", write_three_tensors)):
        (tmp_path / name).symlink_to("thesis")
        write(tmp_path / name)
        assert not (tmp_path / name).is_symlink()
    assert (tmp_path / "thesis").read_text() == "years of work"


def test_lone_surrogates_are_written_and_come_back_escaped(tmp_path):
    write_json(tmp_path / "x.json", {"\ud800": ["a\udfff", "😀"]})
    assert read_json(tmp_path / "x.json") == {"\\ud800": ["a\\udfff", "😀"]}
    assert write_text(tmp_path / "x.md", "a\udfff").read_text() == "a\\udfff"


@pytest.fixture
def store(tmp_path):
    return RecordStore(tmp_path)


def test_a_record_of_a_later_version_is_neither_read_nor_replaced(store, tmp_path):
    path = store.write(bare_record(KEY), {})
    write_json(path, bare_record(KEY, schema=SCHEMA + 1))
    content = path.read_bytes()
    for use in (store.find, store.make_way, lambda key: store.write(bare_record(key), {})):
        with pytest.raises(NewerRecordError) as caught:
            use(KEY)
        assert contains(str(caught.value), [str(path), f"schema {SCHEMA + 1}", "update dass_exp"])
    assert path.read_bytes() == content
    assert store.records() == []
    (problem,) = load(tmp_path).problems
    assert f"schema {SCHEMA + 1}" in problem


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b'{"mine": 1}', b"\xff", json.dumps(bare_record("other")).encode()]
)
def test_what_is_no_record_is_kept_under_another_name(store, content, caplog):
    path = store.write(bare_record(KEY), {})
    path.write_bytes(content)
    store.write(bare_record(KEY), {})
    (kept,) = path.parent.glob("result.json.damaged-*")
    assert kept.read_bytes() == content
    assert contains(caplog.messages[0], [str(path), f"kept as {kept.name}"])
    assert store.find(KEY) == bare_record(KEY)


@pytest.mark.parametrize("what", UNUSUAL)
def test_what_stands_in_place_of_a_record_is_named_by_reports_and_kept_by_runs(store, tmp_path, what):
    path = store.path(KEY)
    path.parent.mkdir(parents=True)
    UNUSUAL[what](path)
    (problem,) = load(tmp_path).problems
    assert contains(problem, [str(path)])
    assert store.find(KEY) is None
    store.write(bare_record(KEY), {})
    assert store.find(KEY) == bare_record(KEY)
    assert len(list(path.parent.glob("result.json.damaged-*"))) == 1


@pytest.mark.parametrize("what", UNUSUAL)
def test_what_stands_in_place_of_a_cell_is_named_by_reports(tmp_path, what):
    path = tmp_path / "hydra" / "2026-01-01" / "00-00-00" / "0" / "cell.json"
    path.parent.mkdir(parents=True)
    UNUSUAL[what](path)
    (problem,) = load(tmp_path).problems
    assert contains(problem, [str(path)])


def test_a_record_folder_that_is_a_dangling_link_is_named(tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / KEY).symlink_to("nowhere")
    (problem,) = load(tmp_path).problems
    assert contains(problem, [f"{tmp_path}/runs/{KEY}"])


def test_a_linked_record_folder_is_not_written_to(store, tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "notes.1.partial").write_text("mine")
    (tmp_path / "runs" / KEY).symlink_to("../elsewhere")
    with pytest.raises(UserError, match=f"runs/{KEY}: it is a link"), store.lock(KEY):
        pass
    with pytest.raises(UserError, match=f"runs/{KEY}: it is a link"):
        store.write(bare_record(KEY), {})
    assert files_under(tmp_path / "elsewhere") == ["notes.1.partial"]


@pytest.mark.parametrize(
    ("number", "advice"),
    [
        (errno.ENOSPC, "make room on that disk"),
        (errno.EACCES, "check its owner and permissions"),
        (errno.EROFS, "cannot be written to"),
        (errno.EISDIR, "a folder stands where a file belongs"),
        (errno.ENAMETOOLONG, "name a shorter one"),
        (errno.ELOOP, "leads back to itself"),
    ],
)
def test_an_error_of_the_file_system_says_what_it_is(number, advice):
    error = OSError(number, os.strerror(number), "/some/file")
    assert contains(os_error_line(error), ["/some/file", os.strerror(number), advice])
    assert ("room" in os_error_line(error)) == (number == errno.ENOSPC)


def test_an_error_without_a_number_keeps_its_text():
    assert contains(os_error_line(OSError("broken\npipe")), ["broken pipe", "check results_dir"])
