"""Train a pruned model with transformers' Trainer; an interrupted training continues from its last checkpoint."""

import logging
import math
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from dass_exp.errors import NumericalError
from dass_exp.models.locate import quiet_libraries
from dass_exp.retrain.base import Retraining
from dass_exp.retrain.checkpoints import complete, last_complete
from dass_exp.retrain.student import Student

log = logging.getLogger(__name__)

SAVED_EVERY = 60.0  # seconds
_WARMUP = 0.1  # of the steps
# entries of the trainer's log, which its checkpoints keep: the curve so far, the losses since its last entry, and time
_CURVE, _LOSSES, _SECONDS = "dass_exp_curve", "dass_exp_losses", "dass_exp_seconds"


@dataclass(frozen=True)
class TrainingData:
    """What a model is trained on.

    Args:
        windows: int64 [windows, tokens].
        dense_hidden: [windows, tokens, features], the dense model's last hidden states; None unless the loss needs it.
        seed: of their order.
    """

    windows: Tensor
    dense_hidden: Tensor | None
    seed: int

    def examples(self, count: int) -> list[dict[str, Tensor]]:
        """Return the first ``count`` examples: all windows in a random order, then all in another one, and so on."""
        chosen = training_order(len(self.windows), count, self.seed)
        examples = [{"input_ids": self.windows[index]} for index in chosen]
        if self.dense_hidden is not None:
            for example, index in zip(examples, chosen, strict=True):
                example["dense_hidden"] = self.dense_hidden[index]
        return examples


def training_order(windows: int, count: int, seed: int) -> list[int]:
    """Return ``count`` indices: those of all windows in a random order, then in another one, and so on."""
    generator = torch.Generator().manual_seed(seed)
    epochs = [torch.randperm(windows, generator=generator) for _ in range(-(-count // windows))]
    return torch.cat(epochs)[:count].tolist() if epochs else []


@dataclass
class TrainingHooks:
    """What is done while a model is trained.

    Args:
        score: scores the model; called behind the steps of the curve, with the trained tensors written into it.
        advance: called after each step.
        fingerprint: what a checkpoint must have been written for, as JSON; another one is not continued.
        earlier_seconds: set by the training: what earlier starts of it took until the checkpoint that it continues.
    """

    score: Callable[[], Mapping[str, Any]]
    advance: Callable[[], None] = lambda: None
    fingerprint: Mapping[str, Any] = field(default_factory=dict)
    earlier_seconds: float = 0.0


def train(
    student: Student, retraining: Retraining, data: TrainingData, folder: Path, hooks: TrainingHooks
) -> list[dict[str, Any]]:
    """Train a student and write the result into its model.

    Args:
        student: the pruned model.
        retraining: how.
        data: on what.
        folder: of checkpoints, one a minute; a complete one of an earlier start is continued.
        hooks: scores on the way, progress.

    Returns:
        the curve: ``step``, mean training ``loss`` since the entry before, and what ``hooks.score`` returned, behind
        each step of ``retraining.curve``; and a last entry with ``step`` and ``loss`` alone.

    Raises:
        NumericalError: the loss is not finite.
        VerificationError: a removed weight is not zero.
    """
    course = _Course(student, retraining, hooks)
    examples: Any = data.examples(retraining.steps * retraining.batch_size)
    with quiet_libraries(), torch.enable_grad(), _as_current_device(student.device):
        trainer = transformers.Trainer(
            model=student,
            args=_arguments(retraining, folder, data.seed, student.device),
            train_dataset=examples,
            data_collator=_stack,
            callbacks=[course],
        )
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.remove_callback(transformers.ProgressCallback)
        last = last_complete(folder, hooks.fingerprint)
        if last is not None:
            log.info("continuing after step %s of an interrupted training", last.name.rpartition("-")[2])
        trainer.train(resume_from_checkpoint=None if last is None else str(last))
    student.write()
    return [*course.entries, {"step": retraining.steps, "loss": course.mean_loss()}]


class _Arguments(TrainingArguments):
    """Arguments of a training on the device of the student alone."""

    @property
    def place_model_on_device(self) -> bool:
        """The parts of a student were created where its model lies."""
        return False


def _as_current_device(device: torch.device) -> AbstractContextManager[Any]:
    """Make a GPU the current one, which accelerate takes; the one before is current again afterwards."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _arguments(retraining: Retraining, folder: Path, seed: int, device: torch.device) -> TrainingArguments:
    arguments = _Arguments(
        output_dir=str(folder),
        use_cpu=device.type == "cpu",
        max_steps=retraining.steps,
        per_device_train_batch_size=retraining.batch_size,
        learning_rate=retraining.lr,
        weight_decay=0.0,
        max_grad_norm=1.0,
        warmup_steps=int(_WARMUP * retraining.steps),
        lr_scheduler_type="cosine",
        optim="adamw_torch",
        seed=seed % 2**32,  # NumPy takes no larger one
        train_sampling_strategy="sequential",
        save_strategy="no",  # by time, see _Course
        save_total_limit=2,  # the one before is complete while the next one is written
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
    )
    if device.type == "cuda":  # the Trainer takes the first GPU, and copies the student to all others that it sees
        arguments.__dict__["_setup_devices"], arguments._n_gpu = device, 1
        torch.cuda.set_device(device)
    return arguments


def _stack(examples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([example[name] for example in examples]) for name in examples[0]}


class _Course(TrainerCallback):
    """Follows a training: its losses, scores behind the steps of the curve, a checkpoint a minute."""

    def __init__(self, student: Student, retraining: Retraining, hooks: TrainingHooks) -> None:
        self._student, self._hooks, self._scored_behind = student, hooks, set(retraining.curve)
        self.entries: list[dict[str, Any]] = []
        self._losses: list[float] = []
        self._began = self._saved = time.monotonic()

    def mean_loss(self) -> float | None:
        """Return the mean loss since the last entry of the curve; None without a step."""
        return math.fsum(self._losses) / len(self._losses) if self._losses else None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take up what an earlier start has noted."""
        del args, control, kwargs
        for entry in state.log_history:
            noted: Any = entry
            self.entries, self._losses = noted[_CURVE], noted[_LOSSES]
            self._hooks.earlier_seconds = noted.get(_SECONDS, 0.0)
        state.log_history = []
        for _ in range(state.global_step):
            self._hooks.advance()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Note the loss, score, and ask for a checkpoint when one is due."""
        del args, kwargs
        self._losses.append(loss := float(self._student.loss))
        if not math.isfinite(loss):
            raise NumericalError(f"the loss of retraining is {loss} in step {state.global_step}; lower retrain.lr")
        if state.global_step in self._scored_behind:
            self._student.write()
            entry = {"step": state.global_step, "loss": self.mean_loss(), **self._hooks.score()}
            self.entries, self._losses = [*self.entries, entry], []
        self._hooks.advance()
        if time.monotonic() - self._saved >= SAVED_EVERY and state.global_step < state.max_steps:
            self._student.write()  # which verifies the masks
            seconds = self._hooks.earlier_seconds + time.monotonic() - self._began
            noted: Any = {_CURVE: self.entries, _LOSSES: self._losses, _SECONDS: seconds}
            state.log_history = [noted]
            control.should_save = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Mark the checkpoint as complete."""
        del control, kwargs
        complete(Path(str(args.output_dir)) / f"checkpoint-{state.global_step}", self._hooks.fingerprint)
        self._saved = time.monotonic()
