"""What does the command line say to what it does not understand, and does help help?"""

import json

import jsonschema
import pytest

import patterndsl
from patterndsl.cli import main
from patterndsl.cli.arguments import _EPILOGS

COMMANDS = ("check", "show", "compile", "run", "schema")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["chekc", "x"], "there is no command `chekc`\n  = help: did you mean `check`?"),
        (["frobnicate"], "choose from check, show, compile, run, schema"),
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
        (["run", "causal", "-n", "8", "--dtype", "float23"], "did you mean `float32`?"),
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


def test_commands_that_are_to_come_are_absent(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--help"])
    out = capsys.readouterr().out
    assert not any(word in out for word in ("report", "prove", "explain", "bench", "table"))
    assert set(_EPILOGS) == {"", *COMMANDS}


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
