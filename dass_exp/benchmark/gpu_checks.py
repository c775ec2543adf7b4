"""The checks of ``make gpu-check`` that compare pruning and scoring on a GPU with the CPU, and with their promises."""

import copy
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

from dass_exp.api import load, method_of, perplexity, prune
from dass_exp.benchmark.measure import PruningJob, time_floor, time_pruning
from dass_exp.config.compose import composing, settings_of
from dass_exp.config.settings import CalibrationConfig
from dass_exp.data.texts import OfflineText
from dass_exp.data.tokens import calibration_tokens
from dass_exp.engine.prune import EngineOptions, prune_model
from dass_exp.engine.verify import Verification
from dass_exp.errors import one_line
from dass_exp.masks import NM
from dass_exp.models.decoder import decoder_of
from dass_exp.paths import project_root
from dass_exp.runs.context import ModelCache, RunContext
from dass_exp.runs.memory import BASE
from dass_exp.runs.resolve import resolve
from dass_exp.runs.run import run
from dass_exp.storage.records import RecordStore

# Share of mask bits that may differ from the CPU's: another order of summation decides between nearly equal scores;
# methods that update weights as they go carry each such decision on.
_BOUNDS = {True: 2e-2, False: 1e-3}
_WAITS = 3  # of a block, by docs/performance.md
_SLOW = ("alps", "admm", "thanos")  # on the CPU that they are compared with: on a few blocks
_FEW = 2  # blocks
_TIMEOUT_S = 600


@dataclass(frozen=True)
class Line:
    """One line of the result: what was checked, how it came out, and the numbers."""

    name: str
    status: Literal["ok", "differs", "failed", "measured", "not run"]
    detail: str


Check = Callable[[], Line]


@dataclass(frozen=True)
class Setup:
    """What the checks work on.

    Args:
        name: of the model.
        model: dense, float32, on the CPU.
        tokenizer: of the model.
        tokens: int64 [sequences, tokens], calibration and scored windows alike.
        device: the GPU.
        block: hidden and intermediate features of the block that is timed.
    """

    name: str
    model: nn.Module
    tokenizer: Any
    tokens: Tensor
    device: torch.device
    block: tuple[int, int]

    @classmethod
    def load(cls, model: str, device: torch.device, samples: int, length: int, block: tuple[int, int]) -> "Setup":
        """Load the model and cut the tokens.

        Raises:
            UserError: there is no such model, or no text.
        """
        loaded, tokenizer = load(model, device="cpu")
        config = CalibrationConfig("c4_mini", num_samples=samples, seq_len=length)
        tokens = calibration_tokens(OfflineText("c4"), config, tokenizer, "never", 0).ids
        return cls(model, loaded, tokenizer, tokens, device, block)

    def copy(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """Return a dense copy of the model on the GPU."""
        return copy.deepcopy(self.model).to(dtype).to(self.device)

    def shorter(self) -> "Setup":
        """Return the same with the model's first blocks only."""
        model: Any = copy.deepcopy(self.model)
        del decoder_of(model).blocks[_FEW:]
        model.config.num_hidden_layers = _FEW
        if getattr(model.config, "layer_types", None):
            model.config.layer_types = model.config.layer_types[:_FEW]
        return replace(self, model=model)


def guarded(name: str, check: Check, optional: bool = False) -> Line:
    """Run a check; one that raises says why in its line: it failed, unless it tries an optional kernel."""
    try:
        return check()
    except Exception as error:  # noqa: BLE001 - drivers and kernels raise errors of many kinds
        return Line(name, "not run" if optional else "failed", one_line(error, 120))


def checks(setup: Setup) -> Iterator[tuple[str, Check]]:
    """Yield the name and the function of every check."""
    yield "precision", lambda: _precision(setup)
    folder = project_root() / "conf" / "method"
    for name in sorted(path.stem for path in folder.glob("*.yaml")):
        if method_of(name).prunes:
            part = setup.shorter if name in _SLOW else lambda: setup
            yield f"masks of {name}", lambda name=name, part=part: _masks(part(), name)  # type: ignore[misc]
    yield "perplexity", lambda: _perplexity(setup)
    for dtype in (torch.bfloat16, torch.float16):
        yield str(dtype).removeprefix("torch."), lambda dtype=dtype: _half(setup, dtype)  # type: ignore[misc]
    yield "batch 1 against 4", lambda: _repeated(setup, "batch 1 against 4", 1, 4)
    yield "the same run twice", lambda: _repeated(setup, "the same run twice", 4, 4)
    yield "waits of a block", lambda: _waits(setup)
    yield "memory after a run", lambda: _memory(setup)
    yield "out of memory", lambda: _out_of_memory(setup)
    yield "streamed, and two cells in a process", lambda: _runs(setup)
    yield "two models in a process", lambda: _two_models(setup)
    yield "retraining", lambda: _retraining(setup)
    yield "peak memory against the plan", lambda: _planned_memory(setup)
    for name in ("dass", "wanda", "sparsegpt"):
        yield f"seconds of {name}", lambda name=name: _seconds(setup, name)  # type: ignore[misc]
    for name in ("dass", "sparsegpt"):
        title = f"a block of {setup.block[0]} x {setup.block[1]}, {name}"
        yield title, lambda name=name, title=title: _large_block(setup, title, name)  # type: ignore[misc]
    yield "two GPUs", lambda: _two_gpus(setup)
    yield "two workers", lambda: _two_workers(setup)


def _verdict(name: str, right: bool, detail: str) -> Line:
    return Line(name, "ok" if right else "differs", detail)


def _precision(setup: Setup) -> Line:
    precision = torch.get_float32_matmul_precision()
    name = torch.cuda.get_device_name(setup.device)
    return _verdict("precision", precision == "highest", f"{name}; float32 products in {precision}: no TF32 in Grams")


def _masks(setup: Setup, name: str) -> Line:
    method = method_of(name)
    cpu, gpu = copy.deepcopy(setup.model), setup.copy()
    here = prune(cpu, setup.tokens if method.stat else None, name).masks
    there = prune(gpu, setup.tokens if method.stat else None, name).masks
    share = _share_differing(here, there)
    bound = _BOUNDS[method.updates_weights]
    detail = f"{share:.2e} of the bits of {len(here)} masks differ from the CPU's, at most {bound:.0e} expected"
    return _verdict(f"masks of {name}", share <= bound, detail)


def _share_differing(first: Any, second: Any) -> float:
    off = sum(int((first[name] != second[name].to(first[name].device)).sum()) for name in first)
    return off / sum(first[name].numel() for name in first)


def _perplexity(setup: Setup) -> Line:
    cpu, gpu = (perplexity(model, setup.tokens) for model in (setup.model, setup.copy()))
    return _verdict("perplexity", abs(gpu / cpu - 1) <= 1e-3, f"dense: {gpu:.4f}, on the CPU {cpu:.4f}")


def _half(setup: Setup, dtype: torch.dtype) -> Line:
    name, model = str(dtype).removeprefix("torch."), setup.copy(dtype)
    exact, dense = perplexity(setup.copy(), setup.tokens), perplexity(model, setup.tokens)
    prune(model, setup.tokens, "dass")
    pruned = perplexity(model, setup.tokens)
    detail = f"perplexity {dense:.3f}, in float32 {exact:.3f}; pruned by DaSS {pruned:.3f}"
    return _verdict(name, abs(dense / exact - 1) <= 2e-2 and pruned < float("inf"), detail)


def _repeated(setup: Setup, name: str, first: int, second: int) -> Line:
    masks = [prune(setup.copy(), setup.tokens, "sparsegpt", batch_size=size).masks for size in (first, second)]
    share = _share_differing(*masks)
    # libraries for GPUs may choose another kernel for another shape, and only then another last digit
    bound = 0.0 if first == second else _BOUNDS[True]
    return _verdict(name, share <= bound, f"{share:.2e} of the mask's bits differ, at most {bound:.0e} expected")


def _waits(setup: Setup) -> Line:
    """Count what torch itself reports as synchronising in a run."""
    blocks = int(setup.model.config.num_hidden_layers)  # type: ignore[union-attr,arg-type]
    model, options = setup.copy(), EngineOptions(batch_size=1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with _synchronisations_reported():
            prune_model(model, setup.tokens, method_of("dass"), NM(2, 4), options, [Verification()])
    waits = sum("synchroniz" in str(warning.message) for warning in caught)
    start = 5 * len(setup.tokens) + 10  # tokens to the device, arguments compared, once a run
    detail = f"{waits} in {blocks} blocks, DaSS; at most {_WAITS} a block and {start} at the start expected"
    return _verdict("waits of a block", waits <= _WAITS * blocks + start, detail)


@contextmanager
def _synchronisations_reported() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("warn")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _memory(setup: Setup) -> Line:
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(setup.device)
    torch.cuda.reset_peak_memory_stats(setup.device)
    model = setup.copy()
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    prune(model, setup.tokens, "dass")
    peak = torch.cuda.max_memory_allocated(setup.device)
    del model
    left = torch.cuda.memory_allocated(setup.device) - before
    detail = f"{left / 1e6:.1f} MB left; peak {peak / 1e9:.2f} GB for a model of {size / 1e9:.2f} GB"
    return _verdict("memory after a run", left < 1e6, detail)


def _out_of_memory(setup: Setup) -> Line:
    free = torch.cuda.mem_get_info(setup.device)[0]
    try:
        torch.empty(2 * free, dtype=torch.uint8, device=setup.device)
    except torch.OutOfMemoryError as error:
        line = one_line(error)
        return _verdict("out of memory", "\n" not in line and "memory" in line.lower(), line[:100])
    return Line("out of memory", "not run", f"twice the free {free / 1e9:.1f} GB were given")


def _runs(setup: Setup) -> Line:
    """Run resident, streamed and resident cells in this process, records included."""
    name, found = "streamed, and two cells in a process", []
    context = RunContext(shared=ModelCache())
    with _composed(setup) as common:
        for cell in (["method=dass"], ["method=dass", "model.placement=stream", "rerun=true"], ["method=wanda"]):
            config = settings_of([*common, *cell])
            placement, record = str(resolve(config, context).placement), run(config, context).record
            found.append((placement, *record["metrics"]["perplexity"].values()))
    (first, resident), (second, streamed), (third, _) = found
    right = (first, second, third) == ("resident", "stream", "resident") and abs(streamed / resident - 1) <= 1e-3
    return _verdict(name, right, f"{first} {resident:.4f}, {second} {streamed:.4f}, then {third}")


def _two_models(setup: Setup) -> Line:
    """Run cells of two models in this process: the second is loaded whole, and both are gone afterwards."""
    name, context, placements = "two models in a process", RunContext(shared=ModelCache()), []
    before = torch.cuda.memory_allocated(setup.device)
    with tempfile.TemporaryDirectory() as folder, _composed(setup) as common:
        shorter: Any = setup.shorter().model
        shorter.save_pretrained(folder)
        setup.tokenizer.save_pretrained(folder)
        for model in ([], [f"model.path={folder}", "model.name=shorter"]):
            config = settings_of([*common, *model, "method=dass"])
            placements.append(str(resolve(config, context).placement))
            run(config, context)
    context.cache.clear()
    left = torch.cuda.memory_allocated(setup.device) - before
    detail = f"{placements[0]}, then {placements[1]}; {left / 1e6:.1f} MB left"
    return _verdict(name, placements == ["resident", "resident"] and left < 1e6, detail)


def _retraining(setup: Setup) -> Line:
    """Train two steps on every GPU that is there, up to two."""
    steps = [
        "retrain=lora",
        "retrain.steps=2",
        "retrain.batch_size=2",
        f"retrain.seq_len={min(setup.tokens.shape[1], 64)}",
    ]
    found: dict[str, tuple[float, float]] = {}
    with _composed(setup) as common:
        for index in range(min(torch.accelerator.device_count(), 2)):
            device = torch.device(setup.device.type, index)
            config = settings_of([*common, "method=dass", *steps, f"model.device={device}", "rerun=true"])
            record = run(config, RunContext()).record
            (before, after) = (
                next(iter(entry["perplexity"].values())) for entry in record["metrics"]["retrain"]["curve"]
            )
            found[str(device)] = before, after
    first, *others = found.values()
    right = all(after < float("inf") for _, after in found.values())
    right &= all(abs(other[1] / first[1] - 1) <= 1e-2 for other in others)
    shown = ", ".join(f"{before:.3f} to {after:.3f} on {device}" for device, (before, after) in found.items())
    return _verdict("retraining", right, f"perplexity in two steps of LoRA: {shown}")


def _planned_memory(setup: Setup) -> Line:
    """Compare the peak of the GPU in a resident and in a streamed run with what was planned from shapes."""
    right, shown = True, []
    with _composed(setup) as common:
        for placement in ("resident", "stream"):
            config = settings_of([*common, "method=sparsegpt", f"model.placement={placement}", "rerun=true"])
            needs = resolve(config, RunContext()).needs
            peak = run(config, RunContext()).record["cost"]["peak_gpu_bytes"]
            if needs is None:
                raise ValueError("nothing was planned")
            planned = (needs.resident if placement == "resident" else needs.streamed) - BASE
            right &= peak <= planned
            shown.append(f"{placement} {peak / 1e9:.2f} GB of {planned / 1e9:.2f} GB planned")
    return _verdict("peak memory against the plan", right, ", ".join(shown) + ", SparseGPT")


@contextmanager
def _composed(setup: Setup) -> Iterator[list[str]]:
    """Yield the overrides that all runs share; their records are thrown away."""
    model = [f"model.path={setup.name}", "model.name=checked"] if Path(setup.name).is_dir() else [f"model={setup.name}"]
    samples, length = setup.tokens.shape
    sizes = [f"calibration.num_samples={samples}", f"calibration.seq_len={length}", f"eval.perplexity.context={length}"]
    with tempfile.TemporaryDirectory() as results, composing():
        places = [f"results_dir={results}", "tracker=none", f"model.device={setup.device}"]
        yield [*model, *sizes, "eval=ppl_mini", *places]


def _seconds(setup: Setup, name: str) -> Line:
    job = PruningJob(setup.copy(), setup.tokens)
    time_floor(job)  # warm-up: the first pass of a process is slower
    floor, total = time_floor(job), time_pruning(job, method_of(name))["total"]
    return Line(f"seconds of {name}", "measured", f"{total:.2f} s, {total / floor:.2f} of the unavoidable passes")


def _large_block(setup: Setup, title: str, name: str) -> Line:
    """Time two random blocks of a large model; the total waits for the device, its parts are launches only."""
    hidden, intermediate = setup.block
    heads = max(1, hidden // 128)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=heads,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval().to(setup.device)
    tokens = torch.randint(256, setup.tokens.shape, generator=torch.Generator().manual_seed(0))
    parts = time_pruning(PruningJob(model, tokens, batch_size=1), method_of(name))
    shown = ", ".join(f"{part} {parts[part]:.3f}" for part in ("forward", "statistics", "solve", "write", "verify"))
    return Line(title, "measured", f"two blocks {parts['total']:.2f} s (launching: {shown} s)")


def _two_gpus(setup: Setup) -> Line:
    """Compare the masks of the second GPU with those of the first."""
    if torch.accelerator.device_count() < 2:
        return Line("two GPUs", "not run", "one GPU")
    other = replace(setup, device=torch.device(setup.device.type, 1))
    masks = [prune(each.copy(), setup.tokens, "sparsegpt").masks for each in (setup, other)]
    share = _share_differing(*masks)
    return _verdict("two GPUs", share <= _BOUNDS[True], f"{share:.2e} of the mask's bits differ between the two")


def _two_workers(setup: Setup) -> Line:
    """Let the command share two cells among workers, and compare their perplexities with those of this process."""
    if torch.accelerator.device_count() < 2:
        return Line("two workers", "not run", "one GPU")
    methods = ("dass", "wanda")
    with _composed(setup) as common:
        results = next(Path(each.partition("=")[2]) for each in common if each.startswith("results_dir="))
        shared = [each for each in common if not each.startswith("model.device=")]  # each worker has its own
        launched = ["--multirun", *shared, f"variant={','.join(methods)}", "hydra/launcher=joblib"]
        command = [sys.executable, "-m", "dass_exp", *launched]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_TIMEOUT_S)
        if done.returncode:
            return Line("two workers", "failed", " ".join(done.stderr.split())[-120:])
        theirs = RecordStore(results).records()
        ours = [run(settings_of([*common, f"method={name}", "rerun=true"]), RunContext()).record for name in methods]
    there, here = ({_method_of(record): _perplexity_of(record) for record in records} for records in (theirs, ours))
    cards = sorted({str(record["environment"]["gpu_index"]) for record in theirs if _method_of(record) in methods})
    shown = ", ".join(f"{name} {there.get(name, float('nan')):.4f} (here {own:.4f})" for name, own in here.items())
    right = here.keys() <= there.keys() and all(abs(there[name] / own - 1) <= 1e-3 for name, own in here.items())
    right &= len(cards) == len(methods)
    return _verdict("two workers", right, f"on GPU {' and '.join(cards)}: perplexity of {shown}")


def _method_of(record: Mapping[str, Any]) -> str:
    return str(record["config"]["method"]["name"])


def _perplexity_of(record: Mapping[str, Any]) -> float:
    (value,) = record["metrics"]["perplexity"].values()
    return float(value)
