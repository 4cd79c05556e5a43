"""When the replacement is in force, when it is refused, and that it says nothing."""

import subprocess
import sys

import pytest
import torch
import trl.trainer.utils as utils

import prefkern
from prefkern.integrations.trl import patching as integration
from prefkern.integrations.trl.patching import patch, unpatch

ORIGINAL = utils._ChunkedLogProbFunction
COMPACTS = utils._use_triton


@pytest.fixture(autouse=True)
def _restored() -> object:
    yield
    unpatch()
    assert utils._ChunkedLogProbFunction is ORIGINAL
    assert utils._use_triton is COMPACTS


def test_a_plain_call_lasts_until_unpatch() -> None:
    patch()
    assert utils._ChunkedLogProbFunction is not ORIGINAL
    assert utils._use_triton(torch.device("cpu"))
    patch()
    unpatch()
    assert utils._ChunkedLogProbFunction is ORIGINAL
    unpatch()  # nothing left to undo


def test_a_block_ends_what_it_began() -> None:
    with patch() as first:
        with patch():
            pass
        assert utils._ChunkedLogProbFunction is not ORIGINAL, "the inner block did not begin it"
    assert utils._ChunkedLogProbFunction is ORIGINAL
    with first:
        assert utils._ChunkedLogProbFunction is not ORIGINAL
    assert utils._ChunkedLogProbFunction is ORIGINAL


def test_a_block_inside_a_plain_patch_changes_nothing() -> None:
    patch()
    with patch():
        pass
    assert utils._ChunkedLogProbFunction is not ORIGINAL


def test_an_error_inside_restores() -> None:
    with pytest.raises(KeyError), patch():
        raise KeyError
    assert utils._ChunkedLogProbFunction is ORIGINAL


def test_unpatch_inside_a_block() -> None:
    with patch():
        unpatch()
        assert utils._ChunkedLogProbFunction is ORIGINAL


def test_calls_are_counted_from_each_patch() -> None:
    def head() -> None:
        utils._ChunkedLogProbFunction.apply(
            torch.randn(3, 4), torch.randn(5, 4), None, torch.tensor([0, 1, 4]), 1.0, 32768
        )

    with patch() as outer:
        head()
        with patch() as inner:
            head()
            assert (outer.calls, inner.calls) == (2, 1)


@pytest.mark.parametrize("version", ["1.14.2", "1.17.0", "1.17.0.dev0", "2.0.0", "0.29.1"])
def test_an_unknown_version_is_refused(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda name: version)
    with pytest.raises(ImportError, match=rf"TRL {version} .* works with TRL 1\.15 and 1\.16.*nothing was replaced"):
        patch()
    assert utils._ChunkedLogProbFunction is ORIGINAL


@pytest.mark.parametrize("version", ["1.15.0", "1.16.0", "1.16.3"])
def test_known_versions_are_taken(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda name: version)
    with patch():
        assert utils._ChunkedLogProbFunction is not ORIGINAL


def test_another_signature_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Other:
        @staticmethod
        def forward(ctx, last_hidden, weight, bias, targets, temperature, chunk_size):  # type: ignore[no-untyped-def]
            raise AssertionError

    monkeypatch.setattr(utils, "_ChunkedLogProbFunction", Other)
    with pytest.raises(ImportError, match="nothing was replaced"):
        patch()
    assert utils._ChunkedLogProbFunction is Other


def test_without_trl() -> None:
    code = (
        "import sys; sys.modules['trl'] = None\n"
        "import prefkern\n"
        "try: prefkern.integrations.trl.patch()\n"
        "except prefkern.MissingDependency as error: print(error)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.startswith("prefkern.integrations.trl needs trl: pip install 'prefkern[trl]'")


def test_importing_the_integration_loads_no_trl() -> None:
    code = "import sys, prefkern.integrations.trl; print(sorted({'trl', 'transformers', 'triton'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_says_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    with patch():
        pass
    assert capfd.readouterr() == ("", "")


def test_zero3_is_refused() -> None:
    weight = torch.nn.Parameter(torch.randn(5, 4))
    weight.ds_id = 0  # what DeepSpeed marks its partitioned parameters with
    with pytest.raises(ValueError, match=r"ZeRO-3.*ZeRO-2 or FSDP2"):
        integration._head.apply(torch.randn(3, 4), weight, None, torch.tensor([0, 1, 4]), 1.0, 32768)


def test_is_public() -> None:
    assert prefkern.integrations.trl.patch is patch
