"""The settings that take one of a few words, with these words; nothing here imports torch."""

from dass_exp.errors import one_of

SCOPES = ("mlp", "attention", "all")
DTYPES = ("float32", "bfloat16", "float16")
BOS_POLICIES = ("never", "stream", "window")
PLACEMENTS = ("resident", "stream")
ACTIVATION_CACHES = ("device", "cpu", "disk")

CHOICES = {
    "scope": SCOPES,
    "model.dtype": ("auto", *DTYPES),
    "model.placement": ("auto", *PLACEMENTS),
    "model.bos": ("auto", *BOS_POLICIES),
    "calibration.sampling": ("joined", "document"),
    "calibration.cache": ACTIVATION_CACHES,
    "experts.starved": ("uniform", "raise"),
    "eval.cache": ("memory", "disk"),
    "eval.zeroshot.data": ("offline", "hub"),
}

SWITCHES = ("plan", "rerun", "save_masks", "eval.divergence", "model.accept_license", "model.trust_remote_code")


def check_choice(setting: str, value: object) -> None:
    """Raise a UserError unless ``value`` is one of the words that ``setting`` takes."""
    one_of(setting, value, CHOICES[setting])


def complete(line: str) -> list[str]:
    """Return what the last word of a command line may become, ``setting=word``; empty if it is no such setting."""
    setting, equals, typed = line.rsplit(" ", maxsplit=1)[-1].partition("=")
    before, comma, begun = typed.rpartition(",")
    known = CHOICES.get(setting, ("true", "false") if setting in SWITCHES else ())
    words = [word for word in known if word.startswith(begun)] if equals else []
    return [f"{setting}={before}{comma}{word}" for word in words]
