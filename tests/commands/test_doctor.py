"""The doctor in fresh processes: as installed, with optional packages hidden, with a broken core."""

import subprocess
import sys
import textwrap
from importlib.metadata import version

import pytest
import torch

HIDE = """
import sys

class Hide:
    def __init__(self, names):
        self.names = names

    def find_spec(self, name, path=None, target=None):
        if name in self.names or name.split(".")[0] in self.names:
            raise ModuleNotFoundError(f"No module named {name!r} (hidden)", name=name)

sys.meta_path.insert(0, Hide(%r))
"""


def doctor(*hidden: str, before: str = "") -> subprocess.CompletedProcess[str]:
    code = HIDE % (hidden,) + textwrap.dedent(before)
    code += "\nfrom prefkern.commands import main\nsys.exit(main(['doctor']))\n"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=170)


def sections(done: subprocess.CompletedProcess[str]) -> dict[str, dict[str, str]]:
    """The lines of each section: what stands before the first two spaces, and the rest."""
    found: dict[str, dict[str, str]] = {}
    for line in done.stdout.splitlines():
        if line and not line.startswith(" "):
            found[line] = {}
        elif line:
            name, _, text = line.strip().partition("  ")
            found[list(found)[-1]][name] = text.strip()
    return found


@pytest.mark.slow
def test_as_installed_every_operator_works_and_trl_can_be_patched() -> None:
    pytest.importorskip("trl")
    done = doctor()
    assert done.returncode == 0, done.stderr
    found = sections(done)
    assert found["Versions"]["torch"] == version("torch")
    assert found["Versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert found["Versions"]["prefkern._core"].endswith((".so", ".pyd"))
    for operator in ("linear_token_logprobs", "token_logprobs"):
        assert found["Operators"][f"{operator}, cpu"].startswith("ok: plain torch (")
    for operator in ("data.gae", "data.pack", "data.collate_pairs"):
        assert found["Operators"][f"{operator}, cpu"].startswith("ok: Rust, prefkern._core (")
    assert found["Trainers"]["TRL"].startswith("ok: prefkern.integrations.trl.patch()")


def test_without_optional_packages_it_says_how_to_install_them_and_is_still_usable() -> None:
    done = doctor("triton", "trl", "transformers", "liger_kernel")
    assert done.returncode == 0, done.stderr
    found = sections(done)
    assert {found["Versions"][name] for name in ("triton", "trl", "transformers", "liger-kernel")} == {"missing"}
    assert found["Trainers"]["TRL"] == "not installed"
    assert found["Missing"]["prefkern[trl]"] == "pip install 'prefkern[trl]' (without it: trl, transformers)"
    assert "liger-kernel" in found["Missing"]["prefkern[bench]"]
    assert found["Missing"]["triton"].startswith("pip install triton (")
    assert found["Operators"]["linear_token_logprobs, cpu"].startswith("ok: plain torch")
    if not torch.cuda.is_available():
        assert "Triton is missing" in found["Operators"]["linear_token_logprobs, cuda"]


def test_a_trl_that_is_refused_is_reported_with_the_reason() -> None:
    pytest.importorskip("trl")
    refusal = """
    from types import SimpleNamespace
    def patch():
        raise ImportError("TRL 9.9.0 is not known to fit")
    sys.modules["prefkern.integrations.trl"] = SimpleNamespace(patch=patch)
    """
    done = doctor(before=refusal)
    assert done.returncode == 0
    assert sections(done)["Trainers"]["TRL"] == "cannot be patched, ImportError: TRL 9.9.0 is not known to fit"


def test_without_the_compiled_module_it_fails_and_says_what_to_do() -> None:
    done = doctor("prefkern._core", "trl")
    assert done.returncode == 1
    found = sections(done)
    assert found["Versions"]["prefkern._core"].startswith("missing: pip install --force-reinstall prefkern")
    assert found["Operators"]["data.gae, cpu"].startswith("FAILED, MissingDependency: ")
    assert found["Operators"]["linear_token_logprobs, cpu"].startswith("ok: ")
    assert done.stderr.count("does not work on cpu") == 3


def test_a_wrong_result_is_a_failure() -> None:
    wrong = """
    import prefkern
    real = prefkern.token_logprobs
    prefkern.token_logprobs = lambda *args, **options: real(*args, temperature=1.001, **options)
    """
    done = doctor("trl", before=wrong)
    assert done.returncode == 1
    found = sections(done)["Operators"]
    assert found["token_logprobs, cpu"].startswith("FAILED, ArithmeticError: log-probabilities differ from float64 by ")
    assert found["linear_token_logprobs, cpu"].startswith("ok: ")
