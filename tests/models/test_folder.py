"""The identity of a local model folder: every byte of every file in it, or the file is on the list of harmless ones."""

from __future__ import annotations

import fnmatch
import json
import os
import shutil

import pytest
from support import contains, files_under
from transformers import AutoModelForCausalLM

from dass_exp.config.settings import ModelConfig
from dass_exp.errors import UserError
from dass_exp.models.folder import HARMLESS, MANIFEST, folder_digest
from dass_exp.models.locate import locate
from dass_exp.models.shards import INDEX
from dass_exp.storage.durable import write_json

MORE = ["vocab.json", "merges.txt", "special_tokens_map.json", "added_tokens.json", "tokenizer.model", "modeling_x.py"]
MORE += ["parts/more.txt", "README.md", "LICENSE", "generation_config.json", "masks.safetensors"]


@pytest.fixture
def folder(tiny, tmp_path):
    """A model in several files, one of them in a sub-folder, among files of every kind."""
    target = tmp_path / "model"
    shutil.copytree(tiny, target, ignore=shutil.ignore_patterns("*.safetensors"))
    AutoModelForCausalLM.from_pretrained(tiny).save_pretrained(target, max_shard_size="100KB")
    (target / "parts").mkdir()
    index = json.loads((target / INDEX).read_text())
    moved = sorted(set(index["weight_map"].values()))[0]
    (target / moved).rename(target / "parts" / moved)
    for name, file in index["weight_map"].items():
        index["weight_map"][name] = f"parts/{file}" if file == moved else file
    (target / INDEX).write_text(json.dumps(index))
    for name in MORE:
        (target / name).write_text("some text\n")
    write_json(target / MANIFEST, {"key": "k", "told": "t", "files": {}})
    return target


def test_a_change_of_any_file_is_another_model_unless_the_file_is_harmless(folder):
    before, unseen = folder_digest(folder), []
    for name in files_under(folder):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[:-2] + bytes([content[-2] ^ 1]) + content[-1:])
        if name == INDEX:
            (folder / name).write_bytes(content + b"\n")  # which still can be read
        if folder_digest(folder) == before:
            unseen.append(name)
        (folder / name).write_bytes(content)
    assert folder_digest(folder) == before
    assert len(unseen) >= 5
    assert all(any(fnmatch.fnmatchcase(name, pattern) for pattern in HARMLESS) for name in unseen)


def test_a_new_file_is_another_model_unless_it_is_hidden(folder):
    before = folder_digest(folder)
    (folder / ".gitattributes").write_text("x")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "times.json").write_text("x")
    assert folder_digest(folder) == before
    (folder / "parts" / "tokens.txt").write_text("x")
    assert folder_digest(folder) != before


def test_a_change_is_seen_whatever_the_time_of_the_file_says(folder):
    before, file = folder_digest(folder), folder / "merges.txt"
    status = file.stat()
    file.write_text("Some text\n")
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert folder_digest(folder) != before


def outside(folder):
    """Move a shard out of the folder, where its index finds it."""
    index = json.loads((folder / INDEX).read_text())
    moved = sorted(set(index["weight_map"].values()))[0]
    (folder / moved).rename(folder.parent / "shard.safetensors")
    for name, file in index["weight_map"].items():
        index["weight_map"][name] = "../shard.safetensors" if file == moved else file
    (folder / INDEX).write_text(json.dumps(index))


def pipe(name):
    def replace(folder):
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return replace


def shard_as_pipe(folder):
    pipe(next(file for file in files_under(folder) if file.startswith("model-")))(folder)


def linked_folder(folder):
    (folder / "linked").symlink_to(folder.parent)


def dangling(folder):
    (folder / "vocab.json").unlink()
    (folder / "vocab.json").symlink_to("nowhere")


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (outside, [INDEX, "../shard.safetensors", "outside of the folder"]),
        (pipe("config.json"), ["config.json", "found a pipe"]),
        (pipe("tokenizer.json"), ["tokenizer.json", "found a pipe"]),
        (shard_as_pipe, ["model-", "found a pipe"]),
        (linked_folder, ["linked", "link to a folder"]),
        (dangling, ["vocab.json"]),
    ],
)
def test_what_cannot_be_identified_is_refused_by_name(folder, harm, words):
    harm(folder)
    with pytest.raises(UserError) as caught:
        locate(ModelConfig(name="x", path=str(folder)))
    assert contains(str(caught.value), words), caught.value
