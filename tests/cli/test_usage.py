"""What does the command line say to what it does not understand, and does help help?"""

import json
from pathlib import Path

import jsonschema
import pytest

import patterndsl
from patterndsl.cli import main
from patterndsl.cli.examples import EPILOGS

COMMANDS = (
    "check",
    "show",
    "compile",
    "run",
    "bench",
    "report",
    "prove",
    "diff",
    "reach",
    "explain",
    "calibrate",
    "table",
    "schema",
)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["chekc", "x"], "there is no command `chekc`\n  = help: did you mean `check`?"),
        (
            ["frobnicate"],
            "choose from check, show, compile, run, bench, report, prove, diff, reach, explain, calibrate, "
            "table, schema",
        ),
        (["show"], "SPEC"),
        (["show", "causal", "--hed", "3"], "there is no option --hed\n  = help: did you mean --head?"),
        (["show", "causal", "--xyzzy=3"], "there is no option --xyzzy"),
        (["show", "causal", "window(3)"], "one word too many: `window(3)`"),
        (["show", "causal", "-n", "12x"], "-n: `12x` is not a whole number"),
        (["show", "causal", "-n", "-5"], "must be 0 or more"),
        (["show", "causal", "--heads", "0"], "--heads: 0 is too small"),
        (["show", "causal", "--kv-len", "8"], "--q-len"),
        (["show", "causal", "--set", "w"], "write --set w=256"),
        (["show", "causal", "--set", "w=[1,x]"], "is not a list of integers"),
        (["show", "causal", "--grid", "8,8"], "write --grid row=64,col=64"),
        (["show", "causal", "--declare", "doc"], "write --declare doc=int[N]"),
        (["compile", "causal", "-n", "8"], "-o"),
        (["compile", "causal", "-n", "8", "-o", "x.plan"], "write -o x.safetensors"),
        (["compile", "causal", "-o", "x.safetensors"], "add -n 4096"),
        (["run", "causal"], "add -n 4096"),
        (["run", "causal", "-n", "8", "--dtype", "float64"], "help: choose from float32, bfloat16, float16"),
        (["show", "causal", "-n", "2^50"], "-n: 2^50 is too large; it must be 2^40 or less"),
        (["show", "causal", "--cell", "9" * 30], f"--cell: {'9' * 30} is too large; it must be 2^40 or less"),
        (["show", "causal", "--layer", "9" * 23], f"--layer: {'9' * 23} is too large; it must be 2^20 or less"),
        (["show", "causal", "--heads", "65537"], "--heads: 65537 is too large; it must be 65,536 or less"),
        (["show", "causal", "--head", "65536"], "--head: 65536 is too large; it must be 65,535 or less"),
        (["run", "causal", "-n", "256", "--seed", "9" * 23], "--seed: 99999999999999999999999 is too large"),
        (
            ["run", "causal", "-n", "256", "--sample-rows", "9" * 23],
            "--sample-rows: 99999999999999999999999 is too large",
        ),
        (["run", "causal", "-n", "9" * 5000], "... (5000 characters) is too large"),
        (["run", "causal", "-n", "-" + "9" * 5000], "... (5001 characters) is too small"),
        (["run", "causal", "-n", "8", "--dense-limit", "soon"], "`soon` is not a number of seconds"),
        (["run", "x.safetensors", "-n", "8"], "-n has no part here"),
        (["run", "causal", "--input", "x", "--batch", "8"], "--batch has no part here"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_have_a_cure(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error[E701]")
    assert "= help: " in err
    assert said in err


def test_no_command_shows_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    err = capsys.readouterr().err
    assert all(command in err for command in COMMANDS)
    assert "error[E701]: no command is given" in err


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_examples(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    assert f"patterndsl {command}" in capsys.readouterr().out.split("example", 1)[1]


def test_every_command_has_examples() -> None:
    assert set(EPILOGS) == {"", *COMMANDS}


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"patterndsl {patterndsl.__version__}\n"


def test_schema(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schema"]) == 0
    jsonschema.Draft7Validator.check_schema(json.loads(capsys.readouterr().out))


def test_an_expression_that_starts_with_minus(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "--", "-q<=k"]) == 0
    assert main(["check", "-q<=k"]) == 2
    assert "goes after --" in capsys.readouterr().err


def test_interrupts_are_quiet(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("patterndsl.cli.check_command.run", interrupted)
    assert main(["check", "causal"]) == 130
    assert capsys.readouterr() == ("", "")


def test_too_little_memory_is_said(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: object) -> int:
        raise MemoryError

    monkeypatch.setattr("patterndsl.cli.show_command.run", full)
    assert main(["show", "causal"]) == 1
    assert "error[E504]: there is not enough memory" in capsys.readouterr().err


@pytest.mark.parametrize("value", ["0*99999999999999999999", "9" * 5000, "0*" + "9" * 5000], ids=len)
def test_input_values_beyond_all_bounds(value: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", "q - k < t[q]", "--declare", "t=int[]", "--input-values", f"t={value}"]) != 0
    assert "= help: " in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--set", "w=" + "9" * 5000], ["--set", f"w=[{'9' * 5000}]"]], ids=["one", "list"])
def test_parameters_beyond_all_bounds(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "window(w)", *words]) != 0
    assert "= help: " in capsys.readouterr().err


def test_the_switch_that_overwrites_is_the_command_lines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for words in (["show", "causal", "-o", "a.svg"], ["compile", "causal", "-n", "8", "-o", "a.safetensors"]):
        assert main(words) == 0
        assert main(words) == 1
        err = capsys.readouterr().err
        assert "--force" in err
        assert "overwrite=True" not in err
