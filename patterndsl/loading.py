"""How does a text or a file become a pattern? Reading specs and expressions, and programs that were saved."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Never, cast

from patterndsl.composite import Composite
from patterndsl.diagnostics import Diagnostic, InputError, PatternError, Source, error, input_error
from patterndsl.pattern import Pattern, check_mapping, kind_of, place_of, value_tree
from patterndsl.sema.parameters import ParamValue, unknown_parameter
from patterndsl.syntax import tree as ast
from patterndsl.syntax.spec import check_name, read_expression, read_file, read_input, read_yaml

if TYPE_CHECKING:
    import torch

    from patterndsl.runtime.program import Program


def load(path: str | PathLike[str], **others: Never) -> Pattern:
    """The pattern of a YAML spec file. It takes nothing else, as type checkers say too.

    Raises PatternError with everything that is wrong with the file, and InputError (E401) where it is given more than a
    path: parameters take values in `with_params`.
    """
    _check_path("load", path)
    if others:
        raise _no_values(path, others)
    if not os.path.exists(path) and _is_expression(str(path)):
        raise error("E601", f"there is no file `{path}`", None, f'read an expression: patterndsl.parse("{path}")')
    return _checked(*read_file(Path(path)))


def _no_values(path: str | PathLike[str], others: Mapping[str, object]) -> InputError:
    inner = others.get("params")
    given = inner if isinstance(inner, Mapping) else others
    values = ", ".join(f"{name}={value!r}" for name, value in given.items())
    help = f'give values to the pattern: patterndsl.load("{path}").with_params({values})'
    return input_error("E401", f"load takes a path, and no `{next(iter(others))}`", help)


def _check_path(caller: str, path: object) -> None:
    if not isinstance(path, str | PathLike):
        message = f"{caller} takes the path of a file, not {kind_of(path)}"
        raise input_error("E601", message, f'for example patterndsl.{caller}("patterns/local.{_SUFFIXES[caller]}")')
    try:
        os.lstat(path)
    except FileNotFoundError:
        return
    except (OSError, ValueError) as failed:  # too long, or with a character that no path has
        raise error(
            "E601", f"cannot read {path}: {getattr(failed, 'strerror', failed)}", None, "check the path"
        ) from None


_SUFFIXES = {"load": "yaml", "load_program": "safetensors"}


def _is_expression(text: str) -> bool:
    """Whether somebody who names a file would not write this: it has signs of the language, or parses."""
    if text.lower().endswith(_SPEC_SUFFIXES) or any(os.path.exists(text + suffix) for suffix in _SPEC_SUFFIXES):
        return False
    if re.search(r"[()&|<>=~\n]", text):
        return True
    try:
        parse(text)
    except PatternError:
        return False
    return True


def load_program(path: str | PathLike[str], *, device: str | torch.device = "cpu", backend: str = "auto") -> Program:
    """The program of a plan file, with the passes or tiles in it: nothing is planned again.

    backend: by default that of the program that was saved. On another kind of device, or with another backend, the
    pattern is the same and what that needs is found when it runs. Raises PatternError: E601 unreadable, E603 damaged or
    no plan.
    """
    from patterndsl.runtime import plan

    _check_path("load_program", path)
    stored = plan.read(path)
    sizes = stored.sizes
    program = parse(stored.text).compile(
        sizes.total,
        q_len=sizes.q_len,
        kv_len=sizes.kv_len,
        q_start=sizes.q_start,
        heads=stored.num_heads,
        layer=stored.layer,
        device=device,
        backend=stored.backend if backend == "auto" and stored.device_type == str(device).split(":")[0] else backend,
    )
    program.adopt(stored)
    return program


def parse(
    text: str,
    params: Mapping[str, ParamValue | str] | None = None,
    grid: Mapping[str, int | str | Sequence[str]] | None = None,
    inputs: Mapping[str, str] | None = None,
    *,
    name: str = "<expression>",
) -> Pattern:
    """The pattern of an expression, or of a YAML spec text (recognised by its keys, which expressions have not).

    params: values of the parameters (integers, lists, or expressions such as "isqrt(N)"); for a spec text they
    override its defaults. grid: axis sizes, row-major. inputs: types such as {"doc": "int[N]"}.
    name: what diagnostics call the text. Raises PatternError with everything that is wrong.
    """
    _check_arguments(text, params, grid, inputs)
    text = text.removeprefix("\ufeff")  # the byte order mark of some editors
    spec, found = read_yaml(Source(name, text)) if _is_spec(text) else read_expression(text, name)
    declared = {param.name for param in spec.params}
    added = [_param(key, value, found) for key, value in (params or {}).items() if key not in declared]
    if added and declared:
        raise unknown_parameter(added[0].name, dict.fromkeys(declared))
    axes = tuple(_axis(key, value, found) for key, value in grid.items()) if grid is not None else spec.grid
    brought = {key: read_input(key, kind, found) for key, kind in (inputs or {}).items()}
    spec = replace(
        spec,
        params=(*spec.params, *added),
        grid=axes,
        inputs=(*spec.inputs, *(item for item in brought.values() if item is not None)),
        broken=spec.broken | {key for key, item in brought.items() if item is None},
    )
    pattern = _checked(spec, found)
    overrides = {key: value for key, value in (params or {}).items() if key in declared}
    return pattern.with_params(**overrides) if overrides else pattern


def parse_beside(text: str, pattern: Pattern, params: Mapping[str, ParamValue], *, name: str) -> Pattern:
    """The pattern of an expression that may use what another pattern declares: parameters, grid, inputs, definitions.

    It is that relation of the sequence's own keys, and nothing of the other's sources, scores, branches or roles.
    params: values of further parameters, or of these. name: what diagnostics call the text. Raises PatternError.
    """
    theirs = pattern.spec
    spec, found = read_expression(text, name)
    added = tuple(_param(key, value, found) for key, value in params.items())
    params_of_both = (*(item for item in theirs.params if item.name not in params), *added)
    usual = ast.Spec(
        spec.attend,
        params_of_both,
        theirs.grid,
        theirs.inputs,
        theirs.labels,
        theirs.select,
        theirs.imports,
        theirs.define,
        keys=theirs.keys,
        place=spec.place,
    )
    return _checked(usual, found)


_SPEC_SUFFIXES = (".yaml", ".yml")


def _check_arguments(text: object, params: object, grid: object, inputs: object) -> None:
    """Raises InputError (E304) on what is no text and no mapping, and PatternError (E601) on the path of a file."""
    if not isinstance(text, str):
        raise input_error(
            "E304", f"a pattern is text, not {kind_of(text)}", 'for example parse("causal & window(256)")'
        )
    if text.strip().lower().endswith(_SPEC_SUFFIXES) and "\n" not in text.strip():
        help = f'read the file: patterndsl.load("{text.strip()}")'
        raise error("E601", f"`{text.strip()}` is the path of a spec, not its text", None, help)
    for name, given, example in (
        ("params", params, '{"w": 256}'),
        ("grid", grid, '{"row": 64, "col": 64}'),
        ("inputs", inputs, '{"doc": "int[N]"}'),
    ):
        check_mapping(name, given, example)


_KEY = re.compile(r"""^[ \t]*(["']?)[A-Za-z_]\w*\1[ \t]*:(?:\s|$)""", re.MULTILINE)


def _is_spec(text: str) -> bool:
    """Some line starts with a key and its colon, or the text with a bracket of YAML; no expression does."""
    return text.lstrip().startswith(("{", "[")) or _KEY.search(text) is not None


def _param(name: str, value: ParamValue | str, found: list[Diagnostic]) -> ast.Param:
    check_name(name, "a parameter", found)
    return ast.Param(name, value_tree(name, value, found), place=place_of(f"params: {name}"))


def _axis(name: str, value: int | str | Sequence[str], found: list[Diagnostic]) -> ast.Axis:
    check_name(name, "an axis", found)
    place = place_of(f"grid: {name}")
    if isinstance(value, list | tuple):
        return ast.Axis(name, tuple(part for part in value if check_name(part, "an axis", found)), place=place)
    size = value_tree(name, cast("int | str", value), found)
    return ast.Axis(name, size if not isinstance(size, tuple) else (), place=place)


def _checked(spec: ast.Spec, found: Sequence[Diagnostic]) -> Pattern:
    return (Composite if spec.branches else Pattern).of(spec, found)
