"""The numbers of a record under flat names, as trackers and data frames show them."""

from typing import Any


def flat_metrics(record: dict[str, Any]) -> dict[str, float]:
    """Return a record's numbers by flat name: ``perplexity/wikipedia_mini``, ``kl/wikipedia_mini``, ``piqa/acc``."""
    metrics, sparsity = record["metrics"], record["sparsity"]
    flat = {f"perplexity/{name}": value for name, value in metrics.get("perplexity", {}).items()}
    for name, divergence in metrics.get("divergence", {}).items():
        flat |= {f"{score}/{name}": value for score, value in divergence.items()}
    for task, scores in metrics.get("tasks", {}).items():
        shares = ("acc", "acc_norm", "exact_match")
        names = [*shares, *(f"{name}_stderr" for name in shares), "bits_per_byte", "ece"]
        flat |= {f"{task}/{name}": scores[name] for name in names if name in scores}
    flat |= {name: metrics[name] for name in ("mean_acc", "mean_acc_norm") if name in metrics}
    flat |= {f"sparsity/{name}": sparsity[name] for name in ("scope", "decoder", "model")}
    return flat | {f"cost/{name}": value for name, value in record["cost"].items() if value is not None}
