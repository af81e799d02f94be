"""What the README shows is so: links lead somewhere, specs check, code runs, messages are the real ones."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

import patterndsl
from patterndsl.cli import main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
TOUR = (ROOT / "grammar" / "README.md").read_text()


def blocks(text: str, language: str) -> list[str]:
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [body for tag, body in fenced if tag == language]


@pytest.mark.parametrize(("text", "folder"), [(README, "."), (TOUR, "grammar")], ids=["README", "tour"])
def test_links_lead_somewhere(text: str, folder: str) -> None:
    links = re.findall(r"\]\(([^)#]+)\)", text)
    assert links
    assert [link for link in links if not (ROOT / folder / link).exists()] == []


def test_every_example_is_listed() -> None:
    for folder in ("", "sources/"):
        listed = set(re.findall(rf"examples/{folder}([a-z0-9-]+)\.yaml\)", README))
        assert listed == {path.stem for path in (ROOT / "examples" / folder).glob("*.yaml")}


@pytest.mark.parametrize("text", blocks(README, "yaml") + blocks(TOUR, "yaml"))
def test_specs_check(text: str, tmp_path: Path) -> None:
    for path in (ROOT / "examples").glob("*.yaml"):
        (tmp_path / path.name).write_text(path.read_text())
    (tmp_path / "mine.yaml").write_text(text if "attend" in text else text + "attend: causal")
    patterndsl.load(tmp_path / "mine.yaml")


def test_expressions_parse() -> None:
    (expressions,) = [block for block in blocks(README, "") if block.startswith("causal & (window")]
    for line in expressions.strip().splitlines():
        patterndsl.parse(line, grid={"row": 8, "col": 8}, inputs={"doc": "int[N]"})


def test_the_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("longformer.yaml").write_text(blocks(README, "yaml")[0])
    Path("examples").symlink_to(ROOT / "examples")
    x = torch.randn(1, 8, 512, 16)
    names: dict[str, object] = {"query": x, "key": x, "value": x, "x": torch.randn(1, 32, 512)}
    names |= {"doc": torch.arange(512) // 100, "pattern": patterndsl.parse("same(doc)", inputs={"doc": "int[N]"})}
    first, *others = blocks(README, "python")
    exec(first.replace("16384", "512"), names)
    names["pattern"] = patterndsl.parse("same(doc)", inputs={"doc": "int[N]"})
    for code in others:
        if "torch.cuda" not in code:  # a graph of a GPU's kernels
            exec(code, names)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_training_step_in_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each replay learns: of one batch, again and again, the loss goes down."""
    monkeypatch.chdir(ROOT)
    (code,) = [block for block in blocks(README, "python") if "capturable" in block]
    batch, losses = torch.randn(2, 2, 512, 512, device="cuda"), list[float]()
    names: dict[str, Any] = {"torch": torch, "patterndsl": patterndsl, "batches": [batch]}
    exec(code.replace("4096", "512"), names)
    for _ in range(5):
        names["graph"].replay()
        losses.append(names["loss"].item())
    assert losses == sorted(losses, reverse=True)
    assert len(set(losses)) == len(losses)


def test_the_message_is_the_real_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (shown,) = [block for block in blocks(README, "") if block.startswith("$ patterndsl check my.yaml")]
    monkeypatch.chdir(tmp_path)
    Path("my.yaml").write_text("name: mine\nparams: {w: 4}\nattend: causal & windw(w)\n")
    assert main(["check", "my.yaml"]) == 1
    assert capsys.readouterr().err.strip() == shown.split("\n", 1)[1].strip()


def test_reports_and_proofs_are_the_real_ones(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    commands = 0
    for block in blocks(README, ""):
        if not block.startswith(
            (
                "$ patterndsl report",
                "$ patterndsl prove",
                "$ patterndsl reach",
                "$ patterndsl explain",
                '$ patterndsl check "',
            )
        ):
            continue
        for part in block.strip().split("$ patterndsl ")[1:]:
            line, shown = part.split("\n", 1)
            main(shlex.split(line))
            said = capsys.readouterr()
            assert (said.err if line.startswith("check") else said.out).strip() == shown.strip()
            commands += 1
    assert commands >= 10
