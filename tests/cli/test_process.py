"""What only a process shows: exit codes, pipes, what is imported."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
COMMAND = (sys.executable, "-m", "patterndsl")


def run(*words: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *words], capture_output=True, text=True, check=False, env=env, encoding="utf-8")


def imported_by(*words: str) -> set[str]:
    code = f"import sys; from patterndsl.cli import main; main({list(words)!r}); print(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return {name.split(".")[0] for name in done.stderr.split()}


def test_exit_codes() -> None:
    assert run("check", "causal").returncode == 0
    wrong = run("check", "causl")
    assert (wrong.returncode, wrong.stdout) == (1, "")
    assert "did you mean `causal`?" in wrong.stderr
    assert run("chek").returncode == 2


@pytest.mark.parametrize("words", [["causal & windw(3)"], ["causal & window(3)", "-n", "100", "--no-lint"]])
def test_finding_errors_imports_neither_numpy_nor_torch(words: list[str]) -> None:
    assert not {"numpy", "torch", "rich", "PIL", "islpy"} & imported_by("check", *words)


def test_a_run_reads_the_spec_before_it_imports_torch() -> None:
    assert "torch" not in imported_by("run", "causal & windw(3)", "-n", "100")


def test_advice_imports_no_torch() -> None:
    imported = imported_by("check", "causal & strided(64)", "-n", "4096")
    assert "numpy" in imported
    assert not {"torch", "sympy", "rich", "PIL"} & imported


@pytest.mark.parametrize("name", ["mistral", "bigbird", "four-kinds-of-heads", "longnet", "neighborhood-plus-axial"])
def test_check_feels_instant(name: str) -> None:
    before = os.times()
    run("check", str(EXAMPLES / f"{name}.yaml"))
    after = os.times()
    used = after.children_user + after.children_system - before.children_user - before.children_system
    assert used < 2  # half a second on an idle machine


def test_show_imports_no_torch() -> None:
    imported = imported_by("show", "causal & random(2, seed = 1)", "-n", "64")
    assert "numpy" in imported
    assert not {"torch", "rich", "PIL"} & imported


def test_a_reader_that_leaves_is_no_error() -> None:
    words = [*COMMAND, "show", "causal", "-n", "128"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as producer:
        assert producer.stdout
        assert producer.stderr
        producer.stdout.close()
        assert producer.stderr.read() == b""
        assert producer.wait() == 141


@pytest.mark.parametrize("words", [["check", "causal"], ["show", "causal", "-n", "64"], ["schema"]])
def test_output_that_cannot_be_written_is_said(words: list[str], tmp_path: Path) -> None:
    limited = ["sh", "-c", 'ulimit -f 0; exec "$@" >output', "sh", *COMMAND, *words]
    done = subprocess.run(limited, cwd=tmp_path, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("error[E602]: cannot write the output: ")
    assert "Traceback" not in done.stderr


def test_mistakes_that_cannot_be_written_still_count(tmp_path: Path) -> None:
    limited = ["sh", "-c", 'ulimit -f 0; exec "$@" 2>errors', "sh", *COMMAND, "check", "causl"]
    assert subprocess.run(limited, cwd=tmp_path, check=False).returncode == 1


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Children are, even where these tests run in the background, which ignores interrupts and passes that on."""
    former = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, former)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("command", ["run", "bench", "calibrate", "compile"])
def test_an_interrupt_while_pytorch_is_imported_ends_at_once(command: str, tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text(
        "import os, signal\n"
        "try:\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    [None for _ in range(10_000)]\n"
        "except BaseException:  # as imports do that try whether something is there\n"
        "    raise ImportError('half made')\n"
    )
    words = {"calibrate": [], "compile": ["causal", "-n", "64", "-o", str(tmp_path / "plan.safetensors")]}
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    done = run(command, *words.get(command, ["causal", "-n", "64"]), env=env)
    assert (done.returncode, done.stderr) == (-signal.SIGINT, "")


@pytest.mark.parametrize("closed", [1, 2])
@pytest.mark.parametrize(("words", "code"), [(["show", "causal", "-n", "64"], 0), (["check", "causl"], 1)])
def test_a_closed_stream_is_no_error(words: list[str], code: int, closed: int) -> None:
    shell = ["sh", "-c", f'exec "$@" {closed}>&-', "sh", *COMMAND, *words]
    done = subprocess.run(shell, capture_output=True, text=True, check=False)
    assert (done.returncode, "Traceback" in done.stderr) == (code, False)


def test_ascii_output_where_the_encoding_has_no_more() -> None:
    done = run("show", "causal", "-n", "64", env={"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0
    assert done.stdout.isascii()
    assert "#" in done.stdout
