"""The metrics that a table may show: what they are called, which direction is better, where a record holds them."""

from dataclasses import dataclass
from typing import Any, Literal

from dass_exp.errors import UserError, one_of


@dataclass(frozen=True)
class Metric:
    """How a metric is shown.

    Args:
        title: of a table of it.
        label: short, of a column.
        unit: begins the caption.
        axis: label of a figure's axis.
        source: ``windows`` of a text, ``generation`` or ``retrain`` (one number per record), ``tasks`` (one per task,
            and their mean), or ``cost``.
        higher: whether higher is better.
        digits: behind the point.
        scale: from the record's unit to the table's.
        ratio: whether equal ratios mean equal steps, so that a wide range is drawn on a log axis; not for shares.
        by_step: whether the curve of a retraining has it too; that of windows always has.
    """

    title: str
    label: str
    unit: str
    axis: str
    source: Literal["windows", "generation", "retrain", "tasks", "cost"]
    higher: bool = False
    digits: int = 2
    scale: float = 1.0
    ratio: bool = True
    by_step: bool = False

    @property
    def has_steps(self) -> bool:
        """Whether a retrained model has a number of it behind each scored step."""
        return self.source == "windows" or self.by_step

    @property
    def one_number(self) -> bool:
        """Whether a record has a single number of it, so that a table's columns are values of a setting."""
        return self.source in ("windows", "generation", "retrain")


_SHARE: dict[str, Any] = {"digits": 1, "scale": 100.0, "ratio": False}  # in a record; in percent in a table


METRICS = {
    "perplexity": Metric("Perplexity", "perplexity", "perplexity, lower is better", "perplexity", "windows"),
    "kl": Metric(
        "KL divergence from the dense model",
        "KL",
        "mean KL divergence of the dense model's predictions from the pruned one's in nats per token, lower is better",
        "KL divergence, nats per token",
        "windows",
        digits=3,
    ),
    "agreement": Metric(
        "Agreement with the dense model",
        "agreement %",
        "tokens in % at which the dense and the pruned model find the same token most likely, higher is better",
        "same most likely token %",
        "windows",
        higher=True,
        **_SHARE,
    ),
    "perplexity_ratio": Metric(
        "Perplexity over that of the dense model",
        "perplexity / dense",
        "perplexity of the pruned over that of the dense model, lower is better",
        "perplexity / dense",
        "windows",
        digits=3,
    ),
    "generation_equal": Metric(
        "Generated text equal to the dense model's",
        "same text %",
        "tokens in % that are those of the dense model after the same prompt, both greedy, higher is better",
        "generated tokens equal to dense %",
        "generation",
        higher=True,
        **_SHARE,
    ),
    "distinct_4": Metric(
        "Distinct 4-grams of generated text",
        "distinct 4-grams %",
        "different sequences of four generated tokens in % of all; a model that repeats itself has few",
        "distinct 4-grams %",
        "generation",
        higher=True,
        **_SHARE,
    ),
    "gap_closed": Metric(
        "Share of the added loss that training won back",
        "gap closed %",
        "share in % of the loss added by pruning that training won back, higher is better",
        "gap to the dense model closed %",
        "retrain",
        higher=True,
        **_SHARE,
    ),
    "mask_overlap": Metric(
        "Overlap of the kept masks with those chosen after training",
        "mask overlap %",
        "weights in % that the kept mask and the one chosen after training share (Jaccard), mean over roles",
        "overlap of masks %",
        "retrain",
        higher=True,
        by_step=True,
        **_SHARE,
    ),
    "acc": Metric("Accuracy", "accuracy %", "accuracy in %", "accuracy %", "tasks", higher=True, **_SHARE),
    "acc_norm": Metric(
        "Length-normalised accuracy",
        "norm. accuracy %",
        "length-normalised accuracy in %",
        "length-normalised accuracy %",
        "tasks",
        higher=True,
        **_SHARE,
    ),
    "flips": Metric(
        "Answers that pruning changes",
        "flips %",
        "documents in % that exactly one of the dense and the pruned model answers right, lower is better",
        "flipped answers %",
        "tasks",
        **_SHARE,
    ),
    "bits_per_byte": Metric(
        "Loss on the right answer",
        "bits per byte",
        "loss on the right answer in bits per byte, lower is better",
        "bits per byte of the right answer",
        "tasks",
        digits=3,
    ),
    "ece": Metric(
        "Calibration error",
        "ECE %",
        "expected calibration error in %, 15 bins, lower is better",
        "expected calibration error %",
        "tasks",
        **_SHARE,
    ),
    "cost": Metric("Cost", "cost", "cost", "seconds or GB", "cost", digits=1),
}


def metric_of(name: str) -> Metric:
    """Return a metric by its name; ``perplexity:c4_mini`` is that of one of several texts.

    Raises:
        UserError: there is no such metric, or a text is named for one that has none.
    """
    base, _, text = name.partition(":")
    metric = METRICS[one_of("metric", base, tuple(METRICS))]
    of_texts = [known for known, other in METRICS.items() if other.source == "windows"] + ["gap_closed"]
    if text and base not in of_texts:
        several = ", ".join(of_texts)
        raise UserError(f"metric={name}: {base} has no text; only these have: {several}")
    return metric
