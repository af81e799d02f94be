"""Does the wheel work alone, away from the checkout?

An empty virtual environment gets the wheel. Third-party packages are borrowed from the environment that runs the
tests, so nothing is downloaded and their versions are not the subject here.
"""

import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]

LIBRARY_SCRIPT = """
import sys
import patterndsl

pattern = patterndsl.parse("causal & window(4)")
assert patterndsl.parse(str(pattern)) == pattern
assert "torch" not in sys.modules, "a pattern is parsed without torch"
print(patterndsl.__file__)
"""


def run(*command: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run without the PYTHON* variables, which could lead back into the checkout."""
    clean_environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env=clean_environment | {"PYTHONUTF8": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


def run_ok(*command: str | Path, cwd: Path) -> str:
    done = run(*command, cwd=cwd)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def build_wheel(source: Path, folder: Path) -> Path:
    options = ("--no-deps", "--no-build-isolation", "--no-index", "--quiet")
    run_ok(sys.executable, "-m", "pip", "wheel", *options, "--wheel-dir", folder, source, cwd=folder)
    (wheel,) = folder.glob("patterndsl-*.whl")
    return wheel


def names_in(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(REPOSITORY, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The root of an environment that holds the wheel."""
    root = tmp_path_factory.mktemp("installed") / "env"
    venv.create(root, symlinks=True)
    python = root / "bin" / "python"
    options = ("--no-deps", "--no-index", "--quiet")
    run_ok(sys.executable, "-m", "pip", "--python", python, "install", *options, wheel, cwd=root)
    # Python reads no .pth file in a folder that a .pth file names: an editable install there stays out of sight.
    borrowed = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (site_packages,) = root.glob("lib/python*/site-packages")
    (site_packages / "borrowed.pth").write_text("\n".join(sorted(borrowed)), encoding="utf-8")
    return root


def test_wheel_holds_the_grammar_files(wheel: Path) -> None:
    grammar = REPOSITORY / "grammar"
    expected = {f"patterndsl/{path.relative_to(REPOSITORY)}" for path in grammar.rglob("*") if path.is_file()}
    assert "patterndsl/grammar/pattern.lark" in expected
    assert expected <= names_in(wheel)


def test_wheel_holds_the_package_and_its_metadata_only(wheel: Path) -> None:
    tops = {name.split("/")[0] for name in names_in(wheel)}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"patterndsl"}


def test_sdist_builds_the_same_wheel(wheel: Path, tmp_path: Path) -> None:
    run_ok(sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", tmp_path, cwd=REPOSITORY)
    (sdist,) = tmp_path.glob("patterndsl-*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (unpacked,) = (path for path in tmp_path.glob("patterndsl-*") if path.is_dir())
    assert names_in(build_wheel(unpacked, tmp_path)) == names_in(wheel)


def test_library_works_without_the_checkout(installed: Path, tmp_path: Path) -> None:
    origin = run_ok(installed / "bin" / "python", "-c", LIBRARY_SCRIPT, cwd=tmp_path)
    assert Path(origin.strip()).is_relative_to(installed)


def test_command_accepts_a_pattern(installed: Path, tmp_path: Path) -> None:
    run_ok(installed / "bin" / "patterndsl", "check", "causal & window(4)", cwd=tmp_path)


def test_command_rejects_a_misspelling(installed: Path, tmp_path: Path) -> None:
    done = run(installed / "bin" / "patterndsl", "check", "causal & windw(4)", cwd=tmp_path)
    assert done.returncode == 1
    assert "windw" in done.stdout + done.stderr
