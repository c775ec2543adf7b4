"""Damage of every file that is written and read again, and planted links: named, or the clean outcome."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import pytest
from harness import Case, damages

STREAM = ["model.placement=stream", "method=sparsegpt"]
RUNS = {
    "resident": ["resume=true", "save_masks=true"],
    "streamed": [*STREAM, "save_masks=true"],
    "streamed_saved": [*STREAM, "save=saved"],
}
each_run = pytest.mark.parametrize("run", RUNS)


def after_first_block(campaign, run):
    """A run, and the fault that kills it when the state behind its first block is on disk."""
    argv = campaign.base(*RUNS[run])
    names = campaign.operations(argv)
    states = [at for at, name in enumerate(names, 1) if name.startswith("os.rename") and "state.safetensors" in name]
    return argv, {"fault": {"kind": "kill", "at": states[0] + 2}}


def damaged(campaign, name, argv, state, file, **promise):
    """A case for every damage of a file of ``work`` in the state that a run has left."""
    for damage, do in damages().items():
        prepare = lambda box, do=do: (state(box), do(box.work / file))  # noqa: E731
        job = {"unprivileged": damage == "unreadable", **promise.get("job", {})}
        yield Case(f"{name}-{damage}", argv, prepare, **{"codes": [0, 1, 2], **promise, "job": job})


@each_run
def test_the_state_of_an_interrupted_run(campaign, hold, run):
    argv, fault = after_first_block(campaign, run)
    state, files = campaign.state(argv, **fault), campaign.files(argv, **fault)
    assert any(path.name == "state.safetensors" for path in files)
    cases = []
    for file in files:
        folder = file.parts[0] if file.parts[0] == ".saved.partial" else file.parts[1]
        cases += damaged(campaign, file, argv, state, file, words=[folder], same_as=argv)
        missing = lambda box, file=file: (state(box), (box.work / file).unlink())  # noqa: E731
        cases.append(Case(f"{file}-missing", argv, missing, codes=[0, 1, 2], same_as=argv, words=[folder]))
    hold("damaged state", cases)


def test_activations_that_wait_on_the_disk(campaign, hold):
    """Damage while the run goes on."""
    argv = campaign.base(*STREAM, "calibration.cache=disk", "calibration.batch_size=1", "save_masks=true")
    cases = []
    for at in range(20, len(campaign.operations(argv)), 5):
        fault = {"kind": "flip", "at": at, "path": "@/work/results/runs/*/work/**/0*.safetensors"}
        cases.append(Case(f"flip-{at}", argv, job={"fault": fault}, codes=[0, 1, 2], same_as=argv, words=["work"]))
    hold("damaged state", cases)


@pytest.mark.parametrize("run", ["resident", "streamed_saved"])
def test_files_of_a_finished_run(campaign, hold, run):
    """The same command finds the record, makes it again, or names the damaged file."""
    argv = campaign.base(*RUNS[run])
    finished, cases = campaign.state(argv), []
    for file in campaign.files(argv):
        same = argv if file.name == "result.json" else None
        cases += damaged(campaign, file, argv, finished, file, words=[file.parts[0]], same_as=same)
    hold("damaged results", cases)


@pytest.mark.parametrize("placement", ["resident", "stream"])
def test_a_saved_model_that_is_damaged_is_not_pruned_again(campaign, hold, placement):
    saved = campaign.base(*RUNS["streamed_saved"])
    argv = campaign.base("model.path=saved", f"model.placement={placement}", "results_dir=results/2")
    finished, cases = campaign.state(saved), []
    for file in (file for file in campaign.files(saved) if file.parts[0] == "saved"):
        weights = file.suffix == ".safetensors" and file.name.startswith("model")
        codes = [1, 2] if weights else [0, 1, 2]
        cases += damaged(campaign, file.name, argv, finished, file, codes=codes, words=["saved"])
    cases = cases[placement == "stream" :: 2]  # each damage in one of the two
    hold("damaged results", cases)


READ_MASKS = """
import sys
from dass_exp.errors import UserError
from dass_exp.storage.mask_file import load_masks
try:
    load_masks(sys.argv[1])
except UserError as error:
    sys.stderr.write(str(error))
    sys.stderr.flush()
    raise SystemExit(2)
raise SystemExit(0)
"""


def test_masks_that_are_damaged_are_not_read(campaign, hold):
    argv = campaign.base(*RUNS["resident"])
    (file,) = [path for path in campaign.files(argv) if path.name == "masks.safetensors"]
    job = {"prelude": READ_MASKS}
    promise = {"codes": [2], "words": ["masks.safetensors"], "job": job}
    hold("damaged results", damaged(campaign, "masks", [str(file)], campaign.state(argv), file, **promise))


def converted(box):
    """Put the tiny model where an offline model is kept once it is converted; return that folder."""
    from dass_exp.data import assets

    folder = box.cache / assets.model_folder("smollm2_135m").relative_to(assets.cache_dir())
    assets.create_once(folder, lambda target: shutil.copytree(box.model, target, dirs_exist_ok=True))
    return folder


@pytest.mark.parametrize("placement", ["resident", "stream"])
def test_a_cached_model_that_is_damaged(campaign, hold, placement):
    argv = [text for text in campaign.base() if not text.startswith(("model.path", "model.name"))]
    argv.append(f"model.placement={placement}")
    origin = campaign.box()
    folder = converted(origin)
    (first,) = campaign.server.run(origin.job(argv))
    assert first.code == 0, first.stderr
    clean, cases = origin.outcome(), []

    def same(box, result):
        return [] if result.code or box.outcome() == clean else ["another outcome"]

    for file in (file.relative_to(origin.cache) for file in sorted(folder.rglob("*")) if file.is_file()):
        for damage, do in damages().items():

            def copy(box, file=file, do=do):
                shutil.copytree(origin.cache, box.cache, dirs_exist_ok=True)
                do(box.cache / file)

            job, promise = {"unprivileged": damage == "unreadable"}, {"codes": [0, 1, 2], "changes": True, "lines": 6}
            cases.append(Case(f"{file.name}-{damage}", argv, copy, job, words=["smollm2_135m"], after=same, **promise))
    hold("asset cache", cases)


def test_a_cached_text_that_is_damaged(campaign, hold):
    """It is fetched again, which is not possible here: one line, and never another text."""
    argv, cases = campaign.base(), []
    for file in ("c4.utf8", "wiki.utf8"):
        for damage, do in damages().items():
            prepare = lambda box, file=file, do=do: do(box.cache / "files" / file)  # noqa: E731
            job, promise = {"unprivileged": damage == "unreadable"}, {"codes": [1, 2], "lines": 6, "changes": True}
            cases.append(
                Case(f"{file}-{damage}", argv, prepare, job, words=[] if damage == "dangling" else [file], **promise)
            )
    hold("asset cache", cases)


LINKS = [
    "results",
    "results/runs",
    "results/runs/KEY",
    "results/runs/KEY/work",
    "results/runs/KEY/result.json",
    "saved",
]
LINKS += [".saved.partial", ".saved.partial/made", "results/runs/KEY/masks.safetensors", "results/runs/KEY/.lock"]
LINKS += [".saved.lock", "results/hydra", "results/runs/KEY/failed.json", "results/runs/KEY/result.json.partial"]
LINKS += [".saved.partial/state.safetensors", "results/runs/KEY/work/state.safetensors", "results/runs/DENSE"]


@pytest.mark.parametrize("target", ["elsewhere", "elsewhere/thesis.partial", "nowhere"])
@each_run
def test_links_in_the_place_of_what_a_run_writes(campaign, hold, run, target):
    """Nothing behind a planted link is deleted, renamed or overwritten. A link of the user's folders is followed."""
    argv = campaign.base(*RUNS[run])
    clean = campaign.clean(argv)
    keys = sorted((name for name in clean if "/" not in name), key=lambda key: clean[key]["sparsity"]["scope"])
    cases = []
    for name in LINKS:
        if name in ("results", "saved", "results/hydra") and target == "elsewhere":
            continue  # a link of the user, behind which files are added
        place = Path(name.replace("KEY", keys[-1]).replace("DENSE", keys[0]))

        def plant(box, place=place):
            (box.work / place).parent.mkdir(parents=True, exist_ok=True)
            (box.work / place).symlink_to(box.folder / target)
            box.memory = _tree_hash(box.elsewhere)

        def intact(box, result):
            return [] if box.memory == _tree_hash(box.elsewhere) else ["files elsewhere were changed"]

        cases.append(Case(name, argv, plant, codes=[0, 1, 2], same_as=argv, after=intact, lines=2, tidy=False))
    hold("links", cases)


def _tree_hash(folder: Path) -> str:
    digest = hashlib.md5()
    for path in sorted(folder.rglob("*")):
        digest.update(str(path).encode() + (path.read_bytes() if path.is_file() else b""))
    return digest.hexdigest()
