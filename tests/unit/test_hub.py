"""Why a model of the hub cannot be had: one clause, and what to do where there is no network."""

import pytest
from huggingface_hub import constants
from huggingface_hub.errors import LocalEntryNotFoundError

from brisk import hub, sd_models
from brisk.options import UserError

pytestmark = pytest.mark.quick
ADVICE = "; give a folder, or get it beforehand by `hf download owner/none`."


def raised(error, cause):
    """`error`, as it is where it was raised while `cause` was handled."""
    error.__context__ = cause
    return error


def test_without_a_network_the_sentence_says_so_and_what_to_do(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    start = "--model owner/none is neither a pipeline folder nor a hub model that can be reached: "
    with pytest.raises(UserError) as refused:
        sd_models.pipeline_index("owner/none", {}, "--model")
    assert str(refused.value) == f"{start}its files are not all in the cache and HF_HUB_OFFLINE is set{ADVICE}"
    missing = raised(OSError("owner/none does not appear to have a file named config.json."), LocalEntryNotFoundError("away"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert hub.why(missing, "owner/none") == (
        f"its files are not all in the cache and {constants.ENDPOINT} cannot be reached{ADVICE}")  # fmt: skip
    assert hub.why(missing) == f"its files are not all in the cache and {constants.ENDPOINT} cannot be reached"


def test_other_reasons_are_those_of_the_libraries(monkeypatch, tmp_path):
    error = OSError("no file named\n model.safetensors.")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert hub.why(error, "owner/none") == "no file named model.safetensors." and hub.why(error, limit=7) == "no file"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert hub.why(error, "owner/none") == f"no file named model.safetensors{ADVICE}"
    for folder in (str(tmp_path), "./none", "some/longer/path"):
        assert hub.why(error, folder) == "no file named model.safetensors."
