"""Which pattern is meant, at which sizes, with which inputs? From the words of the command line to a bound pattern."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from patterndsl.composite import Composite
from patterndsl.diagnostics import PatternError, error, input_error, nearest
from patterndsl.loading import load, parse
from patterndsl.pattern import Pattern
from patterndsl.sema.parameters import MAX_SIZE

if TYPE_CHECKING:
    import numpy as np

    from patterndsl.ir.relation import Relation
    from patterndsl.sema.bind import InputShape

    Array = np.ndarray[Any, np.dtype[Any]]

DEFAULT_HEADS = 8


# ---- the pattern --------------------------------------------------------------------------------------------


def pattern_of(spec: str, arguments: argparse.Namespace) -> Pattern:
    """The pattern of a SPEC with --set, --grid and --declare. Raises PatternError with everything that is wrong."""
    params = {name: _param_value(name, text) for name, text in _pairs("--set", arguments.params).items()}
    if not is_path(spec):
        _check_used(params, spec, arguments)
        grid = {name: _param_number(text) for name, text in _pairs("--grid", _axes(arguments.grid)).items()}
        found = parse(spec, params, grid or None, _pairs("--declare", arguments.declare) or None)
        return of_term(found, arguments.term)
    for option, given in (("--grid", arguments.grid), ("--declare", arguments.declare)):
        if given:
            raise error("E701", f"{option} is for expressions; {spec} is a file", None, f"change it in {spec}")
    pattern = load(spec)
    return of_term(pattern.with_params(**params) if params else pattern, arguments.term)


def single(pattern: Pattern, what: str) -> Pattern:
    """The pattern, if it is one relation. what: is of one. Raises PatternError (E701) where it is made of terms."""
    if isinstance(pattern, Composite):
        names = [term.name for term in pattern.terms]
        terms = "a term" if len(names) == 1 else "terms"
        message = f"{what} is of one term, and the pattern is made of {terms}: {', '.join(names)}"
        others = "" if len(names) == 1 else ", then the same for each of the others"
        raise error("E701", message, None, f"add --term {names[0]}{others}")
    return pattern


def other_single(pattern: Pattern) -> Pattern:
    """The same of the second of two patterns, whose terms no option names."""
    if isinstance(pattern, Composite):
        names = [term.name for term in pattern.terms]
        help = f"put it first, with --term {names[0]}"
        raise error("E701", f"the second pattern is made of terms: {', '.join(names)}", None, help)
    return pattern


def of_term(pattern: Pattern, name: str | None) -> Pattern:
    """One term of a pattern by its name. Raises PatternError (E701) where there is none."""
    if name is None:
        return pattern
    terms = {term.name: term.pattern for term in pattern.terms} if isinstance(pattern, Composite) else {}
    if name not in terms:
        near = nearest(name, terms)
        listed = f"the terms are {', '.join(terms)}" if terms else "the pattern is one relation: leave --term out"
        raise error("E701", f"there is no term `{name}`", None, f"did you mean `{near}`?" if near else listed)
    return terms[name]


def _check_used(params: Mapping[str, object], spec: str, arguments: argparse.Namespace) -> None:
    """Raises PatternError (E401) on a parameter that no expression has."""
    other = getattr(arguments, "other", None)
    if other is not None and is_path(other):
        return
    values = (text.partition("=")[2] for text in arguments.params)
    used = set(re.findall(r"[A-Za-z_]\w*", " ".join((spec, other or "", arguments.grid or "", *values))))
    for name in params:
        if name not in used:
            raise error("E401", f"`{spec}` has no parameter `{name}`", None, f"leave out --set {name}")


def is_path(spec: str) -> bool:
    """A SPEC is a path when it ends like a spec file, is a file, or begins as no expression does. Raises PatternError
    (E601) on a near miss."""
    if spec.lower().endswith((".yaml", ".yml")) or os.path.isfile(spec):
        return True
    if os.path.isdir(spec):
        raise error("E601", f"{spec} is a folder", None, f"name the specs in it: {os.path.join(spec, '*.yaml')}")
    for suffix in (".yaml", ".yml"):
        if os.path.isfile(spec + suffix):
            raise error("E601", f"there is no file {spec}", None, f"did you mean {spec}{suffix}?")
    return spec.startswith(("/", "./", "../"))


def _axes(text: str | None) -> list[str]:
    return re.split(r",(?=\s*[A-Za-z_]\w*\s*=)", text) if text else []


def _pairs(option: str, texts: Sequence[str]) -> dict[str, str]:
    """`name=value` words as a mapping. Raises PatternError (E701) on anything else."""
    pairs: dict[str, str] = {}
    for text in texts:
        name, equals, value = (part.strip() for part in text.partition("="))
        if not equals or not re.fullmatch(r"[A-Za-z_]\w*", name) or not value:
            examples = {"--set": "w=256", "--grid": "row=64,col=64", "--declare": "doc=int[N]"}
            example = examples.get(option, "doc=0*100,1*156")
            raise error("E701", f"{option} `{text}` is not name=value", None, f"write {option} {example}")
        if name in pairs:
            raise error("E701", f"{option} {name} is given twice", None, "keep one of the two")
        pairs[name] = value
    return pairs


def _param_value(name: str, text: str) -> int | list[int] | str:
    if not text.startswith("["):
        return _param_number(text)
    items = [item.strip() for item in text.removeprefix("[").removesuffix("]").split(",")]
    if not text.endswith("]") or not all(re.fullmatch(r"[+-]?\d{1,30}", item) for item in items):
        raise error("E701", f"--set {name}: `{text}` is not a list of integers", None, f"write --set '{name}=[1,2,4]'")
    return [int(item) for item in items]


def _param_number(text: str) -> int | str:
    return int(text) if re.fullmatch(r"[+-]?\d{1,30}", text) else text


# ---- sizes --------------------------------------------------------------------------------------------------


def sizes_of(pattern: Pattern, arguments: argparse.Namespace, default_n: int | None) -> dict[str, Any]:
    """The size arguments of `bind` and `compile`. Raises PatternError (E701) where no length is given."""
    n = arguments.n
    if n is None and arguments.q_len is None:
        if arguments.kv_len is not None:
            raise error("E701", "--kv-len alone does not say how many queries there are", None, "add --q-len, or -n")
        if default_n is None:
            raise error("E701", "no length is given", None, "add -n 4096, or --q-len and --kv-len")
        n = default_n
    return {
        "n": n,
        "q_len": arguments.q_len,
        "kv_len": arguments.kv_len,
        "q_start": arguments.q_start or 0,
        "heads": heads_of(arguments, pattern),
        "layer": arguments.layer or 0,
    }


def heads_of(arguments: argparse.Namespace, *patterns: Pattern, default: int = DEFAULT_HEADS) -> int:
    """--heads; or as many as the patterns have list items for; or enough for --head, or the default."""
    head = getattr(arguments, "head", None)
    listed = (pattern.listed_heads for pattern in patterns)
    known = arguments.heads or min((heads for heads in listed if heads is not None), default=None)
    heads: int = known or max(default, (head or 0) + 1)
    if head is not None and head >= heads:
        raise error("E701", f"there is no head {head} among {heads}", None, f"--head is from 0 to {heads - 1}")
    return heads


def with_heads(failed: PatternError, num_heads: int) -> PatternError:
    """The same error; a list that is too short may be right for fewer heads than were asked about."""
    hint = f"fewer heads than {num_heads}: --heads"
    found = failed.diagnostics
    return PatternError([replace(item, help=f"{item.help}; {hint}") if item.code == "E405" else item for item in found])


# ---- inputs -------------------------------------------------------------------------------------------------


def documents_of(relations: Iterable[Relation], arguments: argparse.Namespace) -> frozenset[str]:
    """The inputs that are drawn, as numbers of packed documents: those that are asked to be equal, where no option
    gives any."""
    from patterndsl.analysis.inputs import documents_in

    return frozenset() if arguments.inputs or arguments.input_values else documents_in(relations)


def sampled(shapes: Iterable[InputShape], given: Container[str]) -> tuple[dict[str, Array], list[str]]:
    """Labels and lists at random in place of those that are found in calls or layers, by the names that relations
    read; whose they are. Raises PatternError (E504) where that is too much."""
    from patterndsl.analysis.inputs import expected_inputs

    missing = [shape for shape in shapes if shape.name not in given]
    drawn: dict[str, Array] = {}
    for shape in missing:
        made = expected_inputs([shape])
        if made is None:
            message = f"`{shape.name}` is more than is drawn at random"
            raise error("E504", message, None, f"give a smaller length, or --inputs with `{shape.name}`")
        drawn |= made
    return drawn, [shape.name for shape in missing]


def inputs_of(
    shapes: Iterable[InputShape],
    arguments: argparse.Namespace,
    *,
    drawn: bool = False,
    documents: Container[str] = (),
    exact: str | None = None,
) -> dict[str, Array]:
    """The inputs that a pattern reads: int64 or bool, [length] or, from a file, [batch, length]. drawn: whether labels
    and lists that calls or layers find may be left out. documents: those that are drawn here (`documents_of`). exact:
    whose answer is, so that it draws none.

    Raises PatternError (E501) on missing and unknown ones, (E502) on values that do not fit.
    """
    wanted = {shape.name: shape for shape in shapes}
    given: dict[str, Array] = {}
    if arguments.inputs:
        given |= {name: values for name, values in read_tensors(arguments.inputs).items() if name in wanted}
    for name, text in _pairs("--input-values", arguments.input_values).items():
        if name not in wanted:
            raise _unknown_input(name, wanted)
        given[name] = _values(wanted[name], text)
    for name, shape in wanted.items():
        is_found = drawn and shape.found_by != "caller"
        if name in documents and shape.found_by == "caller" and shape.dtype == "int" and shape.length is not None:
            from patterndsl.analysis.inputs import drawn_documents

            given[name] = drawn_documents(shape.length)
        if name not in given and not is_found:
            raise _missing_input(shape, arguments.inputs, exact)
    return {name: _checked(shape, given[name]) for name, shape in wanted.items() if name in given}


def read_tensors(path: str) -> dict[str, Array]:
    """The tensors of a safetensors file. Raises PatternError (E601)."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        return load_file(path)
    except OSError as failed:
        raise error("E601", f"cannot read {path}: {failed.strerror or failed}", None, "check the path") from None
    except (SafetensorError, KeyError, TypeError, ValueError) as failed:
        raise error("E601", f"cannot read {path}: {failed}", None, "give a safetensors file of int or bool") from None


def _unknown_input(name: str, wanted: Mapping[str, InputShape]) -> PatternError:
    near = nearest(name, wanted)
    listed = f"it reads {', '.join(wanted)}" if wanted else "it reads none"
    return input_error("E501", f"the pattern reads no input `{name}`", f"did you mean `{near}`?" if near else listed)


def _missing_input(shape: InputShape, path: str | None, exact: str | None) -> PatternError:
    length = shape.size if shape.size is not None else 4
    half = length // 2
    example = f"{shape.name}=0*{half},1*{length - half}" if half else f"{shape.name}=0"
    where = f" (it is not in {path})" if path else ""
    help = f"give it: --input-values {example}, or --inputs FILE.safetensors"
    why = f", and {exact} draws none at random" if exact else ""
    return input_error("E501", f"input `{shape.name}` is missing{where}{why}", help)


_RUN = re.compile(r"\s*([+-]?\d{1,30}|true|false)\s*(?:\*\s*(\d{1,30}))?\s*", re.IGNORECASE)
_TRUTHS = {"true": 1, "false": 0}


def _values(shape: InputShape, text: str) -> Array:
    """`0,0,1` or `0*2,1`: values, and how often each."""
    import numpy as np

    values: list[int] = []
    counts: list[int] = []
    for part in text.strip("[]").split(","):
        run = _RUN.fullmatch(part)
        if run is None:
            help = f"write {shape.name}=0,0,1 or {shape.name}=0*100,1*156"
            raise error("E701", f"--input-values {shape.name}: `{part}` is no value", None, help)
        word = run[1].lower()
        values.append(_TRUTHS[word] if word in _TRUTHS else int(word))
        counts.append(int(run[2]) if run[2] else 1)
    if max(map(abs, values)) >= 2**62:
        raise input_error("E502", f"input `{shape.name}` holds a number beyond 62 bits", "use smaller numbers")
    if shape.size is not None and sum(counts) != shape.size:  # said before so many are made
        raise _wrong_length(shape, f"{sum(counts):,} values")
    if sum(counts) > MAX_SIZE:
        raise _wrong_length(shape, f"{sum(counts):,} values")
    array = np.repeat(np.array(values, dtype=np.int64), np.array(counts, dtype=np.int64))
    if shape.dtype == "bool" and not set(values) <= {0, 1}:
        raise input_error("E502", f"input `{shape.name}` is not of truth values", "give 0 and 1, or false and true")
    array = array if len(shape.inner) == 1 else array.reshape([size or 0 for size in shape.inner])
    return array.astype(bool) if shape.dtype == "bool" else array


def _checked(shape: InputShape, values: Array) -> Array:
    if values.dtype.kind not in ("b" if shape.dtype == "bool" else "iu"):
        help = f"give {'truth values' if shape.dtype == 'bool' else 'integers'}"
        raise input_error("E502", f"input `{shape.name}` has dtype {values.dtype}, not {shape.dtype}", help)
    depth = len(shape.inner)
    inner = values.shape[-depth:]
    if not 0 <= values.ndim - depth <= 2 or any(
        size not in (None, found) for size, found in zip(shape.inner, inner, strict=False)
    ):
        raise _wrong_length(shape, f"{values.shape[0]:,} values" if values.ndim == 1 else f"shape {list(values.shape)}")
    return values if shape.dtype == "bool" else values.astype("int64")


def _wrong_length(shape: InputShape, shown: str) -> PatternError:
    wanted = "one dimension of at most 2^40" if shape.size is None else f"{shape.size:,} values"
    if len(shape.inner) > 1:
        wanted += f", [{', '.join(map(str, shape.inner))}]"
    return input_error("E502", f"input `{shape.name}` has {shown}", f"give {wanted}")
