"""What counts as a secret, and that nothing else is hidden."""

from __future__ import annotations

import pytest

from dass_exp.config.redact import is_secret, redact, redact_text, refuse_secrets
from dass_exp.errors import UserError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    ("name", "secret"),
    [
        ("token", True),
        ("model.hf_token", True),
        ("HF_TOKEN", True),
        ("WANDB_API_KEY", True),
        ("tracker.apiKey", True),
        ("+method.password", True),
        ("aws_secret_access_key", True),
        ("credentials", True),
        ("min_tokens", False),
        ("pad_token", False),
        ("bos_token_id", False),
        ("HF_TOKEN_PATH", False),
        ("TOKENIZERS_PARALLELISM", False),
        ("key", False),
        ("monkey", False),
    ],
)
def test_names_of_secrets(name, secret):
    assert is_secret(name) is secret


def test_content_is_redacted_at_any_depth(monkeypatch):
    monkeypatch.setenv("MY_PASSWORD", "correct horse")
    content = {"a": [{"api_key": "x", "n": 1}], "note": "it was correct horse", "token": None, "revision": COMMIT}
    hidden = {"a": [{"api_key": "***", "n": 1}], "note": "it was ***", "token": None, "revision": COMMIT}
    assert redact(content) == hidden
    assert redact({"project": COMMIT}) == {"project": "***"}
    assert redact_text("get hf_AbCdEfGh123456 with api_key=abc seed=1") == "get *** with api_key=*** seed=1"


@pytest.mark.parametrize("text", ["hf_transformers", "the token: never", "task-a", "tokens=5", "risk"])
def test_plain_words_stay(text):
    assert redact_text(text) == text


def test_a_refusal_does_not_repeat_the_secret():
    with pytest.raises(UserError, match=r"^tracker.api_key: ") as caught:
        refuse_secrets({"tracker": {"api_key": "hunter2"}})
    assert "hunter2" not in str(caught.value)
    refuse_secrets({"model": {"revision": COMMIT, "path": "meta-llama/Llama-2-7b-hf"}, "method": {"token": None}})
    refuse_secrets([f"model.revision={COMMIT}", "seed=1"], "typed overrides")
