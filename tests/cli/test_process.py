"""What only a process shows: exit codes, pipes, what is imported."""

import subprocess
import sys

COMMAND = (sys.executable, "-m", "patterndsl.cli")


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


def test_check_imports_neither_numpy_nor_torch() -> None:
    assert not {"numpy", "torch", "rich", "PIL"} & imported_by("check", "causal & window(3)", "-n", "100")


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


def test_ascii_output_where_the_encoding_has_no_more() -> None:
    done = run("show", "causal", "-n", "64", env={"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0
    assert done.stdout.isascii()
    assert "#" in done.stdout
