"""What can be typed? The commands and their options, and what to say to something else."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from typing import NoReturn

from patterndsl.cli import values
from patterndsl.cli.examples import EPILOGS
from patterndsl.diagnostics import PatternError, error, nearest
from patterndsl.lower.fallback import BACKENDS

PROGRAM = "patterndsl"

_USUAL_HEADS = "default 8, or the items of a list indexed by `head`"
_SPEC_HELP = "a YAML spec file, or an expression such as 'causal & window(256)'"


class _Parser(argparse.ArgumentParser):
    """argparse, with its complaints as diagnostics."""

    def error(self, message: str) -> NoReturn:
        raise _complaint(message, self)


def parsed(argv: Sequence[str]) -> argparse.Namespace | None:
    """The command and its options; None after --help and --version. Raises PatternError (E701) on anything else."""
    parser, commands = _parser()
    try:
        arguments, unknown = parser.parse_known_args(argv)
    except SystemExit:
        return None
    if unknown:
        raise _unknown(unknown[0], commands[arguments.command])
    if arguments.command is None:
        parser.print_help(sys.stderr)
        raise error("E701", "no command is given", None, f"try: {PROGRAM} show 'causal & window(16)' -n 64")
    return arguments


def _complaint(message: str, parser: argparse.ArgumentParser) -> PatternError:
    """argparse's message in our form, with the nearest of what is allowed."""
    choice = re.search(r"invalid choice: '([^']*)' \(choose from (.*)\)", message)
    if choice is None:
        wrong = re.sub(r"argument (?:-\w/)?(\S+?):", r"\1:", message)
        dash = "; an expression that starts with - goes after --" if "SPEC" in message else ""
        return error("E701", wrong, None, f"{parser.prog} --help explains the options{dash}")
    given, allowed = choice[1], re.findall(r"[\w.-]+", choice[2])
    option = message.split(":")[0].removeprefix("argument ")
    # a misspelt command is a slip; a dtype or backend that is not there was meant
    near = nearest(given, allowed) if option == "COMMAND" else None
    help = f"did you mean `{near}`?" if near else f"choose from {', '.join(allowed)}"
    what = f"there is no command `{given}`" if option == "COMMAND" else f"{option}: there is no `{given}`"
    return error("E701", what, None, help)


def _unknown(given: str, parser: argparse.ArgumentParser | None) -> PatternError:
    """What to say to an option or word too many."""
    options = sorted(parser._option_string_actions) if parser else ["--help", "--version"]
    prog = parser.prog if parser else PROGRAM
    if not given.startswith("-"):
        help = "put quotes around an expression: 'causal & window(16)'"
        return error("E701", f"one word too many: `{given}`", None, help)
    near = nearest(given.split("=")[0], options)
    listed = f"{prog} --help lists them; an expression that starts with - goes after --"
    help = f"did you mean {near}?" if near else listed
    return error("E701", f"there is no option {given.split('=')[0]}", None, help)


def _parser() -> tuple[_Parser, dict[str | None, argparse.ArgumentParser | None]]:
    from patterndsl import __version__

    parser = _Parser(
        prog=PROGRAM,
        description="Sparse attention patterns: check, draw, compile and run them.",
        epilog=EPILOGS[""],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    made: dict[str | None, argparse.ArgumentParser | None] = {None: None}

    def command(name: str, summary: str) -> argparse.ArgumentParser:
        made[name] = commands.add_parser(
            name,
            help=summary,
            description=summary[0].upper() + summary[1:] + ".",
            epilog=EPILOGS[name],
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        found = made[name]
        assert found is not None
        return found

    _check_options(command("check", "say whether specs are right, and what is wrong with them"))
    _show_options(command("show", "draw a pattern: in the terminal, or as PNG, SVG or HTML"))
    _compile_options(command("compile", "write the plan of a pattern at given sizes to a file"))
    _run_options(command("run", "execute a pattern, check it against the oracle, time it against dense attention"))
    _bench_options(command("bench", "time patterns beside dense attention and FlexAttention, in one run"))
    _report_options(command("report", "say what patterns cost, for every length and at one"))
    _prove_options(command("prove", "prove or refute a claim about a pattern for every length"))
    _diff_options(command("diff", "say what one pattern has and another lacks"))
    _reach_options(command("reach", "say what can reach a position through several layers"))
    _explain_options(command("explain", "say which plan runs, what it should take, and what was rejected"))
    _calibrate_options(command("calibrate", "measure the constants of this machine that plans are made with"))
    _table_options(command("table", "compare systems: class, cost, state and reach, derived from their specs"))
    command("schema", "print the JSON Schema of spec files, for editors")
    return parser, made


def _check_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("specs", nargs="+", metavar="SPEC", help=_SPEC_HELP)
    _pattern_options(parser)
    parser.add_argument(
        "-n", type=values.length, metavar="N", help="also check that the specs fit this length, and cost it"
    )
    parser.add_argument("--heads", type=values.heads, metavar="H", help=f"heads ({_USUAL_HEADS})")
    advice = parser.add_mutually_exclusive_group()
    advice.add_argument("--strict", action="store_true", help="warnings are errors")
    advice.add_argument("--no-lint", action="store_true", help="look for errors only")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def _show_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("spec", metavar="SPEC", help=_SPEC_HELP)
    _pattern_options(parser)
    _size_options(parser, "length of the sequence (default 256)")
    parser.add_argument(
        "--head", type=values.head, metavar="H", help="the head to draw, where heads differ (default 0)"
    )
    _input_options(parser)
    parser.add_argument("--cell", type=values.block, metavar="C", help="positions per cell (default: what fits)")
    parser.add_argument("-o", "--output", metavar="FILE", help="write FILE: .png, .svg or .html")
    parser.add_argument("--force", action="store_true", help="overwrite FILE")
    parser.add_argument("--json", action="store_true", help="print the figures of each head group as JSON")


def _compile_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("spec", metavar="SPEC", help=_SPEC_HELP)
    _pattern_options(parser)
    _size_options(parser, "length of the sequence")
    parser.add_argument("-o", "--output", required=True, metavar="FILE", help="the plan, a .safetensors file")
    parser.add_argument("--force", action="store_true", help="overwrite FILE")


def _run_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("spec", metavar="SPEC", help=f"{_SPEC_HELP}; or a plan file")
    _pattern_options(parser)
    _size_options(parser, "length of the sequence")
    _input_options(parser)
    tensors = parser.add_argument_group("tensors")
    tensors.add_argument("--input", metavar="FILE", help="safetensors with query, key, value [B, H, T, D]; else random")
    _tensor_options(tensors)
    how = parser.add_argument_group("execution")
    _runner_options(how)
    how.add_argument("--backward", action="store_true", help="also check and time the gradients")
    how.add_argument(
        "--sample-rows", type=values.block, default=64, metavar="R", help="rows to check where all are too many (64)"
    )
    how.add_argument(
        "--dense-limit",
        type=values.seconds,
        default=20.0,
        metavar="S",
        help="skip dense attention beyond S seconds (20)",
    )
    how.add_argument("--json", action="store_true", help="print the figures as JSON")


def _bench_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("specs", nargs="+", metavar="SPEC", help=_SPEC_HELP)
    _pattern_options(parser)
    group = parser.add_argument_group("sizes")
    group.add_argument("-n", type=values.length, metavar="N", help="length of the sequence (default 4096)")
    group.add_argument("--heads", type=values.heads, metavar="H", help=f"query heads ({_USUAL_HEADS})")
    group.add_argument("--layer", type=values.layer, metavar="L", help="what `layer` is in the pattern (default 0)")
    _tensor_options(group)
    _input_options(parser)
    how = parser.add_argument_group("execution")
    _runner_options(how)
    how.add_argument("--backward", action="store_true", help="also time forward and backward together")
    how.add_argument(
        "--seconds", type=values.seconds, default=10.0, metavar="S", help="of rounds for each pattern (10)"
    )
    how.add_argument(
        "--limit", type=values.seconds, default=20.0, metavar="S", help="skip whoever takes longer a call (20)"
    )
    parser.add_argument("-o", "--output", metavar="FILE", help="write FILE: .json, or a chart as .png or .svg")
    parser.add_argument("--force", action="store_true", help="overwrite FILE")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")


def _report_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("specs", nargs="+", metavar="SPEC", help=_SPEC_HELP)
    _pattern_options(parser)
    parser.add_argument("-n", type=values.length, metavar="N", help="length for figures; 2^20 and 1e6 are understood")
    parser.add_argument(
        "--heads", type=values.heads, metavar="H", help=f"query heads ({_USUAL_HEADS.replace('8', '1')})"
    )
    _form_options(parser)
    parser.add_argument("--layer", type=values.layer, metavar="L", help="what `layer` is in the pattern (default 0)")
    parser.add_argument("--block", type=values.block, metavar="B", help="positions per tile (default 128)")
    _input_options(parser)
    parser.add_argument("--latex", action="store_true", help="print the formulas in LaTeX")
    parser.add_argument("--json", action="store_true", help="print the reports as JSON")


def _prove_options(parser: argparse.ArgumentParser) -> None:
    causality = ("causal", "value-causal", "pattern-causal")
    claims = (*causality, "rows-nonempty", "symmetric", "equals", "within", "dead-terms")
    parser.add_argument("spec", metavar="SPEC", help=_SPEC_HELP)
    parser.add_argument("claim", type=values.claim, choices=claims, metavar="CLAIM", help=", ".join(claims))
    parser.add_argument("other", nargs="?", metavar="OTHER", help="the other pattern of `equals` and `within`")
    _pattern_options(parser)
    parser.add_argument("-n", type=values.length, metavar="N", help="for this length only")
    parser.add_argument("--json", action="store_true", help="print the verdict as JSON")


def _diff_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("spec", metavar="FIRST", help=_SPEC_HELP)
    parser.add_argument("other", metavar="SECOND", help="another one")
    _pattern_options(parser)
    parser.add_argument("-n", type=values.length, metavar="N", help="length of the picture (default 64)")
    parser.add_argument("--layer", type=values.layer, metavar="L", help="what `layer` is in the patterns (default 0)")
    _input_options(parser)
    parser.add_argument("-o", "--output", metavar="FILE", help="draw to FILE: .png or .svg")
    parser.add_argument("--force", action="store_true", help="overwrite FILE")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def _reach_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("spec", metavar="SPEC", help=_SPEC_HELP)
    _pattern_options(parser)
    parser.add_argument(
        "-n", type=values.length, metavar="N", help="length of the sequence; 2^20 and 1e6 are understood"
    )
    parser.add_argument(
        "--heads", type=values.heads, metavar="H", help=f"query heads, which are united ({_USUAL_HEADS})"
    )
    parser.add_argument("--layers", type=values.num_layers, metavar="L", help="layers, where they differ (default 32)")
    _input_options(parser)
    parser.add_argument("--query", type=values.length, metavar="Q", help="say what reaches this position")
    parser.add_argument(
        "--path", type=values.length, nargs=2, metavar=("Q", "K"), help="show a shortest way from K to Q"
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def _explain_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("spec", metavar="SPEC", help=_SPEC_HELP)
    _pattern_options(parser)
    _size_options(parser, "length of the sequence")
    parser.add_argument("--head-dim", type=values.tensor_size, metavar="D", help="size of a head (default 64)")
    parser.add_argument(
        "--device",
        default="cpu",
        metavar="DEVICE",
        help="cpu, cuda; or h100, cpu-2-core or a calibration's .json file, on any machine (default cpu)",
    )
    parser.add_argument("--train", action="store_true", help="show the plan for training, not the one for inference")
    parser.add_argument("--json", action="store_true", help="print all of it as JSON")


def _table_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("specs", nargs="*", metavar="SPEC", help="specs (default: the 17 systems of the survey)")
    parser.add_argument("-n", type=values.length, metavar="N", default=4096, help="length of the counts (default 4096)")
    parser.add_argument("--heads", type=values.heads, metavar="H", default=8, help="heads of a layer (default 8)")
    parser.add_argument(
        "--dim", type=values.tensor_size, metavar="D", default=512, help="width of a layer (default 512)"
    )
    parser.add_argument(
        "-o", "--output", metavar="FILE", help="write FILE: .md, or .html with a picture of each system"
    )
    parser.add_argument("--force", action="store_true", help="overwrite FILE")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")


def _calibrate_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="cpu", metavar="DEVICE", help="cpu, cuda, cuda:1 (default cpu)")
    parser.add_argument("-o", "--output", metavar="FILE", help="write FILE, .json, and store nothing")
    parser.add_argument("--force", action="store_true", help="overwrite FILE; store even what other work disturbed")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def _pattern_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("pattern")
    group.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        dest="params",
        help="a parameter: 256, [1,2,4], or an expression such as isqrt(N); may be repeated",
    )
    group.add_argument("--term", metavar="NAME", help="of a pattern with several sources or branches this term alone")
    group.add_argument("--grid", metavar="ROW=64,COL=64", help="the grid of an expression: axes and sizes, row-major")
    group.add_argument(
        "--declare",
        action="append",
        default=[],
        metavar="NAME=TYPE",
        help="an input of an expression: doc=int[N], prefix=int[], pad=bool[Nk]; may be repeated",
    )


def _size_options(parser: argparse.ArgumentParser, n_help: str) -> None:
    group = parser.add_argument_group("sizes")
    group.add_argument("-n", type=values.length, metavar="N", help=n_help + "; 2^20 and 1e6 are understood")
    group.add_argument("--q-len", type=values.length, metavar="N", help="queries, where they are not as many as keys")
    group.add_argument("--kv-len", type=values.length, metavar="N", help="keys")
    group.add_argument("--q-start", type=values.length, metavar="N", help="position of the first query (default 0)")
    group.add_argument("--heads", type=values.heads, metavar="H", help=f"query heads ({_USUAL_HEADS})")
    group.add_argument("--layer", type=values.layer, metavar="L", help="what `layer` is in the pattern (default 0)")


def _form_options(group: argparse._ActionsContainer) -> None:
    """Of tensors, what their work follows from."""
    group.add_argument(
        "--kv-heads", type=values.heads, metavar="H", help="key and value heads (default: as many as heads)"
    )
    group.add_argument("--head-dim", type=values.tensor_size, metavar="D", help="size of a head (default 64)")
    group.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="of the tensors (default float32)")


def _tensor_options(group: argparse._ActionsContainer) -> None:
    """Of tensors that are made."""
    _form_options(group)
    group.add_argument("--batch", type=values.tensor_size, metavar="B", help="batch size (default 1)")
    group.add_argument("--seed", type=values.seed, default=0, metavar="S", help="of the random tensors (default 0)")


def _runner_options(group: argparse._ActionsContainer) -> None:
    group.add_argument("--device", default="cpu", metavar="DEVICE", help="cpu, cuda, cuda:1 (default cpu)")
    group.add_argument("--backend", choices=BACKENDS, default="auto", help="(default auto)")


def _input_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("inputs that the pattern reads")
    group.add_argument("--inputs", metavar="FILE", help="safetensors with a tensor for each input")
    group.add_argument(
        "--input-values",
        action="append",
        default=[],
        metavar="NAME=VALUES",
        help="doc=0,0,0,1,1 or doc=0*100,1*156 (a value and how often); may be repeated",
    )
