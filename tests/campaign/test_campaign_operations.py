"""Kills, signals and failures at every file operation of a run: the same command gives the clean outcome again."""

from __future__ import annotations

import errno
import shutil
import signal

import pytest
from harness import Box, Case

MASKS = ["save_masks=true"]
STREAM = ["model.placement=stream", "method=sparsegpt"]
RUNS = {
    "resident": MASKS,
    "saved": ["save=saved"],
    "resumable": ["resume=true", *MASKS],
    "streamed": [*STREAM, *MASKS],
    "streamed_saved": [*STREAM, "save=saved"],
    "cached_on_disk": [*STREAM, "calibration.cache=disk", "calibration.batch_size=1"],
}
ERRORS = {"EIO": errno.EIO, "ENOSPC": errno.ENOSPC, "EACCES": errno.EACCES}
SIGNALS = {"INT": signal.SIGINT, "TERM": signal.SIGTERM, "HUP": signal.SIGHUP}
each_run = pytest.mark.parametrize("run", RUNS)


def interrupted(campaign, run, kind, fault, stride=1, also=(), **settings):
    """A case for every ``stride``-th operation of a run: a fault there, then the same command again.

    Hydra's own folders, which are the same in every run, are left to one of them.
    """
    argv = campaign.base(*RUNS[run], *also)
    for at, operation in enumerate(campaign.operations(argv), 1):
        if at % stride == 0 and ("/hydra" not in operation or run == "resident"):
            first = [(argv, {"fault": {**fault, "at": at}})]
            name = f"{run}-{kind}-{at}-{operation.partition(' ')[0]}"
            yield Case(name, argv, before=first, codes=[0], same_as=argv, **settings)


@each_run
def test_a_kill_before_any_operation_loses_nothing(campaign, hold, run):
    hold("kills", interrupted(campaign, run, "kill", {"kind": "kill"}))


@each_run
def test_a_kill_while_a_tensor_file_is_written_loses_nothing(campaign, hold, run):
    argv = campaign.base(*RUNS[run])
    torn = [at for at, name in enumerate(campaign.operations(argv), 1) if name.startswith("tensors ")]
    faults = [(at, [(argv, {"fault": {"kind": "torn", "at": at}})]) for at in torn]
    hold("kills", [Case(f"{run}-torn-{at}", argv, before=first, codes=[0], same_as=argv) for at, first in faults])


def test_two_kills_lose_nothing(campaign, hold):
    argv = campaign.base(*RUNS["streamed_saved"])
    count = len(campaign.operations(argv))
    pairs = [(first, second) for first in range(5, count, 9) for second in range(7, count, 11)]
    faults = [[(argv, {"fault": {"kind": "kill", "at": at}}) for at in pair] for pair in pairs]
    hold(
        "kills",
        [
            Case(f"{first}-{second}", argv, before=before, codes=[0], same_as=argv)
            for (first, second), before in zip(pairs, faults, strict=True)
        ],
    )


def test_a_kill_of_a_run_that_repeats_a_finished_one_loses_nothing(campaign, hold):
    argv = campaign.base(*RUNS["streamed_saved"])
    again = [*argv, "rerun=true"]

    def finish(box: Box) -> None:
        campaign.server.run(box.job(argv))

    operations = campaign.operations(again, finish)
    faults = [
        (at, [(argv, {}), (again, {"fault": {"kind": "kill", "at": at}})]) for at in range(1, len(operations) + 1)
    ]
    hold("kills", [Case(f"again-{at}", argv, before=first, codes=[0], same_as=argv) for at, first in faults])


@pytest.mark.parametrize("name", SIGNALS)
def test_a_signal_before_any_operation_loses_nothing(campaign, hold, name):
    fault = {"kind": "signal", "number": int(SIGNALS[name])}
    hold("signals", interrupted(campaign, "streamed_saved", name, fault, stride=5))


@pytest.mark.parametrize("name", ERRORS)
@pytest.mark.parametrize("run", ["resident", "streamed_saved"])
def test_an_operation_that_fails_costs_a_line_and_the_same_command_succeeds(campaign, hold, run, name):
    fault = {"kind": "fail", "number": ERRORS[name]}
    hold("failing operations", interrupted(campaign, run, name, fault, stride=5))


def test_what_a_failing_operation_says(campaign, hold):
    """The failing run itself: one line, and the reason is the operation's."""
    argv = campaign.base(*RUNS["resident"])
    words = {"EIO": "Input/output error", "ENOSPC": "No space left", "EACCES": "Permission denied"}
    hold(
        "failing operations",
        [
            Case(
                f"{name}-{at}",
                argv,
                job={"fault": {"kind": "fail", "number": number, "at": at, "sticky": True}},
                codes=[0, 1, 2],
                words=[words[name]],
                lines=2,
            )
            for name, number in ERRORS.items()
            for at in range(1, len(campaign.operations(argv)) + 1, 3)
        ],
    )


def test_a_disk_that_fills_up_at_any_operation_and_is_emptied(campaign, hold):
    fault = {"kind": "fail", "number": errno.ENOSPC, "sticky": True}
    hold("full disk", interrupted(campaign, "streamed_saved", "full", fault, stride=3))


def test_a_limit_of_the_size_of_files(campaign, hold):
    argv = campaign.base(*RUNS["streamed_saved"])
    sizes = [1 << bits for bits in range(8, 20)]
    limited = [(size, [(argv, {"limits": {"RLIMIT_FSIZE": size}})]) for size in sizes]
    hold("full disk", [Case(f"limit-{size}", argv, before=first, codes=[0], same_as=argv) for size, first in limited])


def test_in_a_grid_on_a_full_disk_every_cell_is_tried(campaign, hold):
    argv = ["-m", "method=magnitude,wanda", *campaign.base()]
    count = len(campaign.operations(argv))
    full = [{"kind": "fail", "number": errno.ENOSPC, "sticky": True, "at": at} for at in range(1, count, 4)]
    hold(
        "full disk",
        [
            Case(f"grid-{f['at']}", argv, job={"fault": f}, codes=[0, 1, 2], lines=12, words=["No space left"])
            for f in full
        ],
    )


@pytest.mark.parametrize("folder", ["work/results/runs", "work/results", "work/.saved.partial", "tmp"])
def test_a_folder_that_is_removed_on_the_way(campaign, hold, folder):
    hold("removed folders", _disturbed(campaign, folder, {"kind": "remove"}))


@pytest.mark.parametrize("folder", ["work/results/runs", "work/results", "work"])
def test_a_folder_that_becomes_read_only_on_the_way(campaign, hold, folder):
    hold("read-only folders", _disturbed(campaign, folder, {"kind": "readonly"}, unprivileged=True))


def _disturbed(campaign, folder, fault, **job):
    """The disturbed run, and the same again when the folder is writable."""
    argv = campaign.base(*RUNS["streamed_saved"])
    for at in range(2, len(campaign.operations(argv)) + 1, 7):
        first = [(argv, {**job, "fault": {**fault, "at": at, "path": f"@/{folder}"}})]
        yield Case(f"{folder.split('/')[-1]}-{fault['kind']}-{at}", argv, before=first, codes=[0], same_as=argv)


@pytest.mark.parametrize("folder", ["work", "work/results", "work/results/runs", "home", "tmp", "cache", "model"])
def test_a_folder_that_is_read_only_from_the_start(campaign, hold, folder):
    argv = campaign.base(*RUNS["streamed_saved"])

    def protect(box: Box) -> None:
        (box.folder / folder).mkdir(parents=True, exist_ok=True)
        (box.folder / folder).chmod(0o500)

    job = {"unprivileged": True}
    hold("read-only folders", [Case(folder, argv, protect, job, codes=[0, 1, 2], words=["Permission denied"])])


@pytest.mark.parametrize("run", ["resident", "streamed_saved"])
def test_results_that_are_deleted_are_made_again(campaign, hold, run):
    argv = campaign.base(*RUNS[run])

    def finish_and_delete(pattern):
        def prepare(box: Box) -> None:
            campaign.server.run(box.job(argv))
            for path in sorted(box.work.glob(pattern)):
                shutil.rmtree(path) if path.is_dir() else path.unlink()

        return prepare

    patterns = ["results/runs/*/result.json", "results/runs/*/masks.safetensors", "results/runs/*", "results", "saved"]
    hold("removed folders", [Case(f"{run}-{p}", argv, finish_and_delete(p), codes=[0], same_as=argv) for p in patterns])
