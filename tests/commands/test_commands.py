"""The command line: exit codes, one sentence for what is wrong, modules imported only when they are chosen."""

import json
import subprocess
import sys
from importlib.metadata import version
from types import SimpleNamespace

import pytest

from prefkern import MissingDependency, commands


def run(*arguments: str, code: str = "") -> subprocess.CompletedProcess[str]:
    program = ["-c", code] if code else ["-m", "prefkern"]
    return subprocess.run([sys.executable, *program, *arguments], capture_output=True, text=True, timeout=120)


def test_version_is_the_packages() -> None:
    done = run("--version")
    assert (done.returncode, done.stdout) == (0, f"prefkern {version('prefkern')}\n")


def test_help_names_every_command() -> None:
    done = run("--help")
    assert done.returncode == 0
    for name in ("demo", "bench", "plan", "doctor"):
        assert f"\n  {name}" in done.stdout


def test_an_unknown_command_is_one_sentence_and_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert commands.main(["dance"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err == f"prefkern: there is no command 'dance'; use one of {', '.join(commands.COMMANDS)}\n"


def test_no_command_shows_the_help_and_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert commands.main([]) == 2
    assert "commands:" in capsys.readouterr().err


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch):
    """Installs a command whose main is given."""

    def install(main) -> None:
        monkeypatch.setitem(commands.COMMANDS, "probe", ("prefkern_probe", "a test"))
        monkeypatch.setitem(sys.modules, "prefkern_probe", SimpleNamespace(main=main))

    return install


def test_a_command_gets_its_own_arguments_and_its_exit_code_is_returned(command) -> None:
    given: list[str] = []

    def main(argv: list[str]) -> int:
        given.extend(argv)
        return 7

    command(main)
    assert commands.main(["probe", "--help", "--steps", "3", "file"]) == 7
    assert given == ["--help", "--steps", "3", "file"]


def test_ctrl_c_ends_with_130_and_no_traceback(command, capsys: pytest.CaptureFixture[str]) -> None:
    def main(argv: list[str]) -> int:
        raise KeyboardInterrupt

    command(main)
    assert commands.main(["probe"]) == 130
    assert capsys.readouterr().err == "\nprefkern: interrupted\n"


def test_a_missing_package_is_one_sentence_and_exit_code_2(command, capsys: pytest.CaptureFixture[str]) -> None:
    def main(argv: list[str]) -> int:
        raise MissingDependency("the plot needs matplotlib: pip install matplotlib")

    command(main)
    assert commands.main(["probe"]) == 2
    assert capsys.readouterr().err == "prefkern: the plot needs matplotlib: pip install matplotlib\n"


def test_a_commands_module_is_imported_only_when_it_is_chosen() -> None:
    code = (
        "import json, sys, prefkern.commands as c; c.main(['dance']);"
        "print(json.dumps([m for m in sys.modules if m.startswith(('prefkern.', 'triton', 'trl', 'transformers'))]))"
    )
    loaded = set(json.loads(run(code=code).stdout))
    assert "prefkern.commands" in loaded
    chosen = {module for module, _ in commands.COMMANDS.values()}
    assert not loaded & (chosen | {"triton", "trl", "transformers", "prefkern._core"})


def test_plan_prints_every_plan(capsys: pytest.CaptureFixture[str]) -> None:
    assert commands.main(["plan", "--tokens", "8192", "--hidden", "4096", "--vocab", "128256", "--dtype", "bf16"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "N = 8192, H = 4096, V = 128256, bf16"
    found = {line[:40].strip(): line[40:].split() for line in lines[3:]}
    assert found["scoring, no gradient"][:2] == ["score", "1"]
    assert found["frozen head"][:4] == ["frozen(8192)", "2", "67.1", "MB"]  # 2 N H
    assert found["trainable head"][:4] == ["hold(8192)", "3", "2.1", "GB"]  # 2 N V
    assert found["trainable head, max_memory=0"][:2] == ["hold(0)", "4"]


def test_plan_refuses_what_is_no_shape(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        commands.main(["plan", "--tokens", "0", "--hidden", "8", "--vocab", "100"])
    assert stopped.value.code == 2
    assert "argument --tokens: must be at least 1, got 0" in capsys.readouterr().err
