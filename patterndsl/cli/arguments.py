"""What can be typed? The commands and their options, with examples, and what to say to something else."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from patterndsl.diagnostics import PatternError, error, nearest
from patterndsl.lower.fallback import BACKENDS
from patterndsl.sema.parameters import MAX_HEADS, MAX_LAYER, MAX_SIZE

PROGRAM = "patterndsl"

_USUAL_HEADS = "default 8, or the items of a list indexed by `head`"
_SPEC_HELP = "a YAML spec file, or an expression such as 'causal & window(256)'"

_EPILOGS = {
    "": """
examples:
  patterndsl check examples/*.yaml
  patterndsl show 'causal & (window(16) | strided(32))' -n 256
  patterndsl run examples/longformer.yaml -n 4096

`patterndsl COMMAND --help` has the options of a command, and more examples.
""",
    "check": """
examples:
  patterndsl check examples/longformer.yaml
  patterndsl check examples/*.yaml --json
  patterndsl check 'causal & window(w)' --set w=256
  patterndsl check examples/axial.yaml -n 4096     does it fit this length as well?
  patterndsl check examples/*.yaml --strict        warnings are errors

Warnings are advice with numbers, counted at N, or at 4,096 positions: what computes far more than it keeps, attends
nothing, changes nothing, or has a name that means something else elsewhere.
Exit code: 0 when all specs are right, 1 otherwise.
""",
    "show": """
examples:
  patterndsl show examples/longformer.yaml
  patterndsl show 'causal & (window(w) | strided(128))' --set w=64 -n 1048576
  patterndsl show examples/four-kinds-of-heads.yaml -n 256 --head 2
  patterndsl show 'q.row == k.row' --grid row=16,col=16 -n 256 -o axial.svg
  patterndsl show 'causal & same(doc)' --declare 'doc=int[N]' --input-values doc=0*100,1*156
  patterndsl show examples/bigbird.yaml -n 1048576 -o bigbird.html     a page to zoom into

A cell is a square of positions. Full: every pair in it is kept; partial: some are. Colours follow the terminal, and
NO_COLOR where it is set.
""",
    "compile": """
examples:
  patterndsl compile examples/longformer.yaml -n 4096 -o longformer.safetensors
  patterndsl compile 'causal & recent(w)' --set w=512 -n 65536 --heads 16 -o recent.safetensors

A program of the plan: patterndsl.load_program("longformer.safetensors"), or `patterndsl run longformer.safetensors`.
""",
    "run": """
examples:
  patterndsl run examples/longformer.yaml -n 4096
  patterndsl run 'causal & recent(1024)' -n 65536 --heads 4 --dtype bfloat16
  patterndsl run examples/bigbird.yaml -n 4096 --backward --device cuda
  patterndsl run 'causal & same(doc)' --declare 'doc=int[N]' -n 300 --input-values doc=0*100,1*200
  patterndsl run examples/sources/native-sparse.yaml -n 4096 --backward
  patterndsl run plan.safetensors --input qkv.safetensors

The output is compared with float64 attention straight from the predicate: every row where that is small, some rows
otherwise. The error may be twice that of PyTorch's dense attention in the same dtype, at the same inputs or at some
that differ from them in their last digits, as that error is at some by chance very small. Exit code 1 if it is larger.
Keys of sources, gates, tables and projections of roles are made by an initialised layer.
""",
    "bench": """
examples:
  patterndsl bench 'causal & (recent(128) | strided(128))' -n 16384 --heads 4
  patterndsl bench examples/longformer.yaml --backward -o longformer.svg
  patterndsl bench examples/*.yaml -n 65536 --dtype bfloat16 --device cuda --backward -o h200.json
  patterndsl bench examples/sources/*.yaml -n 4096

Each pattern beside dense attention (causal where it is; on CUDA the best kernel) and FlexAttention (the better of
blocks of 128 and 64): the same tensors, in turns, each checked against float64 first. A ratio is the median over rounds
of a rival's time over ours. Memory is the peak beyond the tensors. Exit code 1 if the pattern's own result is wrong.
""",
    "table": """
examples:
  patterndsl table
  patterndsl table examples/longformer.yaml examples/sources/linformer.yaml
  patterndsl table -o systems.html

Every cell is derived from a spec. Of the survey's 17 systems, cells that differ from its Table 1 are marked, and below
the table stands why. Time is the order of pairs at the default parameters; parameters are those of one layer beside
four projections; layers are those after which every position has reached all that it ever reaches.
""",
    "report": """
examples:
  patterndsl report examples/longformer.yaml                 formulas in N and the parameters
  patterndsl report examples/longformer.yaml -n 65536 --heads 16 --dtype bfloat16
  patterndsl report examples/*.yaml -n 65536                 one table
  patterndsl report 'causal & (recent(w) | strided(w))' --set w=64 --latex
  patterndsl report examples/packed-documents.yaml -n 256 --input-values doc=0*100,1*156

Exact: so it is. UpperBound: not more. Expected: what the stated model predicts. Measured: seen in a run.
""",
    "prove": """
examples:
  patterndsl prove examples/longformer.yaml causal
  patterndsl prove examples/streaming-sinks.yaml rows-nonempty
  patterndsl prove 'recent(100)' equals 'window(99, 0)'
  patterndsl prove examples/mistral.yaml within causal
  patterndsl prove examples/prefix-lm.yaml causal --set prefix=0
  patterndsl prove 'causal & (recent(8) | window(4))' dead-terms     what could be dropped

For every N and every value of the parameters from their minimum, where --set and -n do not fix one.
Exit code: 0 proven, 1 refuted, 3 unknown.
""",
    "diff": """
examples:
  patterndsl diff 'recent(8)' 'window(8, 0)' -n 32
  patterndsl diff examples/longformer.yaml 'window(4) | global(2)' --set w=4 --set g=2
  patterndsl diff examples/sources/alibi.yaml causal        the same pairs, other scores

Patterns with sources or branches are compared term by term. Labels and lists that are not given are drawn at random.
Exit code: 0 where the two are equal at that length, 1 where they differ.
""",
    "reach": """
examples:
  patterndsl reach examples/longformer.yaml -n 65536
  patterndsl reach 'causal & recent(256)' -n 4096                how many layers until everything is connected
  patterndsl reach examples/gemma.yaml -n 4096 --layers 26       layers differ; after the last they begin again
  patterndsl reach examples/swin.yaml -n 4096 --query 700        what reaches one query, exactly
  patterndsl reach examples/bigbird.yaml -n 4096 --path 4000 100

Heads of a layer are united, and each layer keeps a position's own content. Exact: so it is. UpperBound, LowerBound:
not more, not less. --path shows where the content of K is after 0, 1, 2, ... layers on a shortest way to Q.
""",
    "explain": """
examples:
  patterndsl explain 'causal & (recent(256) | strided(256))' -n 65536 --heads 16
  patterndsl explain examples/longformer.yaml -n 65536 --heads 16 --device h100 --train
  patterndsl explain examples/sources/pooled-past.yaml -n 4096      each term, the merge, and their sum
  patterndsl explain examples/axial.yaml -n 4096 --device machine.json --json

Expected: what the cost model predicts, for one layer and one batch row. A rejected plan runs with compile(plan=NUMBER).
--device cpu and cuda take the constants that `patterndsl calibrate` stored for this machine, where they fit.
""",
    "calibrate": """
examples:
  patterndsl calibrate                            two CPU cores take half a minute
  patterndsl calibrate --device cuda              minutes, the first time: it tries the blocks of kernels, too
  patterndsl calibrate -o machine.json            for `patterndsl explain --device machine.json`

Without -o the constants are stored for this user, in $XDG_CONFIG_HOME or ~/.config, and plans on this device are made
with them until PyTorch has another version. Where other work kept the CPU busy, nothing is stored unless --force.
""",
    "schema": """
example:
  patterndsl schema > pattern.schema.json

Name the file in a spec's first line, and editors complete the keys:
  # yaml-language-server: $schema=pattern.schema.json
""",
}


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
        epilog=_EPILOGS[""],
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
            epilog=_EPILOGS[name],
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
    parser.add_argument("-n", type=_length, metavar="N", help="also check that the specs fit this length, and cost it")
    parser.add_argument("--heads", type=_heads, metavar="H", help=f"heads ({_USUAL_HEADS})")
    advice = parser.add_mutually_exclusive_group()
    advice.add_argument("--strict", action="store_true", help="warnings are errors")
    advice.add_argument("--no-lint", action="store_true", help="look for errors only")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def _show_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("spec", metavar="SPEC", help=_SPEC_HELP)
    _pattern_options(parser)
    _size_options(parser, "length of the sequence (default 256)")
    parser.add_argument("--head", type=_head, metavar="H", help="the head to draw, where heads differ (default 0)")
    _input_options(parser)
    parser.add_argument("--cell", type=_block, metavar="C", help="positions per cell (default: what fits)")
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
    tensors.add_argument("--kv-heads", type=_heads, metavar="H", help="key and value heads (default: as many as heads)")
    tensors.add_argument("--head-dim", type=_tensor_size, metavar="D", help="size of a head (default 64)")
    tensors.add_argument("--batch", type=_tensor_size, metavar="B", help="batch size (default 1)")
    tensors.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="of the tensors (default float32)")
    tensors.add_argument("--seed", type=_seed, default=0, metavar="S", help="of the random tensors (default 0)")
    how = parser.add_argument_group("execution")
    how.add_argument("--device", default="cpu", metavar="DEVICE", help="cpu, cuda, cuda:1 (default cpu)")
    how.add_argument(
        "--backend",
        choices=BACKENDS,
        default="auto",
        help="(default auto)",
    )
    how.add_argument("--backward", action="store_true", help="also check and time the gradients")
    how.add_argument(
        "--sample-rows", type=_block, default=64, metavar="R", help="rows to check where all are too many (64)"
    )
    how.add_argument(
        "--dense-limit", type=_seconds, default=20.0, metavar="S", help="skip dense attention beyond S seconds (20)"
    )
    how.add_argument("--json", action="store_true", help="print the figures as JSON")


def _bench_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("specs", nargs="+", metavar="SPEC", help=_SPEC_HELP)
    _pattern_options(parser)
    group = parser.add_argument_group("sizes")
    group.add_argument("-n", type=_length, metavar="N", help="length of the sequence (default 4096)")
    group.add_argument("--heads", type=_heads, metavar="H", help=f"query heads ({_USUAL_HEADS})")
    group.add_argument("--kv-heads", type=_heads, metavar="H", help="key and value heads (default: as many as heads)")
    group.add_argument("--head-dim", type=_tensor_size, metavar="D", help="size of a head (default 64)")
    group.add_argument("--batch", type=_tensor_size, metavar="B", help="batch size (default 1)")
    group.add_argument("--layer", type=_layer, metavar="L", help="what `layer` is in the pattern (default 0)")
    group.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="of the tensors (default float32)")
    group.add_argument("--seed", type=_seed, default=0, metavar="S", help="of the random tensors (default 0)")
    _input_options(parser)
    how = parser.add_argument_group("execution")
    how.add_argument("--device", default="cpu", metavar="DEVICE", help="cpu, cuda, cuda:1 (default cpu)")
    how.add_argument(
        "--backend",
        choices=BACKENDS,
        default="auto",
        help="(default auto)",
    )
    how.add_argument("--backward", action="store_true", help="also time forward and backward together")
    how.add_argument("--seconds", type=_seconds, default=10.0, metavar="S", help="of rounds for each pattern (10)")
    how.add_argument("--limit", type=_seconds, default=20.0, metavar="S", help="skip whoever takes longer a call (20)")
    parser.add_argument("-o", "--output", metavar="FILE", help="write FILE: .json, or a chart as .png or .svg")
    parser.add_argument("--force", action="store_true", help="overwrite FILE")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")


def _report_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("specs", nargs="+", metavar="SPEC", help=_SPEC_HELP)
    _pattern_options(parser)
    parser.add_argument("-n", type=_length, metavar="N", help="length for figures; 2^20 and 1e6 are understood")
    parser.add_argument("--heads", type=_heads, metavar="H", help=f"query heads ({_USUAL_HEADS.replace('8', '1')})")
    parser.add_argument("--kv-heads", type=_heads, metavar="H", help="key and value heads (default: as many as heads)")
    parser.add_argument("--head-dim", type=_tensor_size, metavar="D", help="size of a head (default 64)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="of the tensors (default float32)")
    parser.add_argument("--layer", type=_layer, metavar="L", help="what `layer` is in the pattern (default 0)")
    parser.add_argument("--block", type=_block, metavar="B", help="positions per tile (default 128)")
    _input_options(parser)
    parser.add_argument("--latex", action="store_true", help="print the formulas in LaTeX")
    parser.add_argument("--json", action="store_true", help="print the reports as JSON")


def _prove_options(parser: argparse.ArgumentParser) -> None:
    causality = ("causal", "value-causal", "pattern-causal")
    claims = (*causality, "rows-nonempty", "symmetric", "equals", "within", "dead-terms")
    parser.add_argument("spec", metavar="SPEC", help=_SPEC_HELP)
    parser.add_argument("claim", type=_claim, choices=claims, metavar="CLAIM", help=", ".join(claims))
    parser.add_argument("other", nargs="?", metavar="OTHER", help="the other pattern of `equals` and `within`")
    _pattern_options(parser)
    parser.add_argument("-n", type=_length, metavar="N", help="for this length only")
    parser.add_argument("--json", action="store_true", help="print the verdict as JSON")


def _claim(text: str) -> str:
    """As the library or as the command line spells it."""
    return text.replace("_", "-")


def _diff_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("spec", metavar="FIRST", help=_SPEC_HELP)
    parser.add_argument("other", metavar="SECOND", help="another one")
    _pattern_options(parser)
    parser.add_argument("-n", type=_length, metavar="N", help="length of the picture (default 64)")
    parser.add_argument("--layer", type=_layer, metavar="L", help="what `layer` is in the patterns (default 0)")
    _input_options(parser)
    parser.add_argument("-o", "--output", metavar="FILE", help="draw to FILE: .png or .svg")
    parser.add_argument("--force", action="store_true", help="overwrite FILE")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def _reach_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("spec", metavar="SPEC", help=_SPEC_HELP)
    _pattern_options(parser)
    parser.add_argument("-n", type=_length, metavar="N", help="length of the sequence; 2^20 and 1e6 are understood")
    parser.add_argument("--heads", type=_heads, metavar="H", help=f"query heads, which are united ({_USUAL_HEADS})")
    parser.add_argument("--layers", type=_num_layers, metavar="L", help="layers, where they differ (default 32)")
    _input_options(parser)
    parser.add_argument("--query", type=_length, metavar="Q", help="say what reaches this position")
    parser.add_argument("--path", type=_length, nargs=2, metavar=("Q", "K"), help="show a shortest way from K to Q")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def _explain_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("spec", metavar="SPEC", help=_SPEC_HELP)
    _pattern_options(parser)
    _size_options(parser, "length of the sequence")
    parser.add_argument("--head-dim", type=_tensor_size, metavar="D", help="size of a head (default 64)")
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
    parser.add_argument("-n", type=_length, metavar="N", default=4096, help="length of the counts (default 4096)")
    parser.add_argument("--heads", type=_heads, metavar="H", default=8, help="heads of a layer (default 8)")
    parser.add_argument("--dim", type=_tensor_size, metavar="D", default=512, help="width of a layer (default 512)")
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
    group.add_argument("-n", type=_length, metavar="N", help=n_help + "; 2^20 and 1e6 are understood")
    group.add_argument("--q-len", type=_length, metavar="N", help="queries, where they are not as many as keys")
    group.add_argument("--kv-len", type=_length, metavar="N", help="keys")
    group.add_argument("--q-start", type=_length, metavar="N", help="position of the first query (default 0)")
    group.add_argument("--heads", type=_heads, metavar="H", help=f"query heads ({_USUAL_HEADS})")
    group.add_argument("--layer", type=_layer, metavar="L", help="what `layer` is in the pattern (default 0)")


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


# ---- numbers ------------------------------------------------------------------------------------------------


def _whole(least: int, most: int) -> Callable[[str], int]:
    """What reads a whole number in [least, most]."""

    def read(text: str) -> int:
        power = re.fullmatch(r"(\d{1,2})(?:\^|\*\*)(\d{1,2})|(\d{1,3})[eE]\+?(\d{1,2})", text.strip())
        if not power and not re.fullmatch(r"[+-]?\d+(?:[_,]\d+)*", text.strip()):
            raise argparse.ArgumentTypeError(f"`{_short(text)}` is not a whole number")
        if power:
            base, exponent = (int(power[1]), power[2]) if power[1] else (10, power[4])
            value: int = int(power[3] or 1) * base ** int(exponent)
        else:  # Python itself reads no numbers of thousands of digits
            value = int(text.strip().replace(",", "").replace("_", "")[:100])
        if value < least:
            raise argparse.ArgumentTypeError(f"{_short(text)} is too small; it must be {least} or more")
        if value > most:
            limit = f"{most:,}" if most < 2**20 else f"2^{most.bit_length() - 1}"
            raise argparse.ArgumentTypeError(f"{_short(text)} is too large; it must be {limit} or less")
        return value

    return read


def _short(text: str) -> str:
    return text if len(text) <= 40 else f"{text[:30]}... ({len(text)} characters)"


_length = _whole(0, MAX_SIZE)
_block = _whole(1, MAX_SIZE)
_heads = _whole(1, MAX_HEADS)
_head = _whole(0, MAX_HEADS - 1)
_layer = _whole(0, MAX_LAYER)
_num_layers = _whole(1, MAX_LAYER)
_seed = _whole(0, 2**62)
_tensor_size = _whole(1, 2**30)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"`{text}` is not a number of seconds") from None
    if not value >= 0:
        raise argparse.ArgumentTypeError(f"`{text}` is not a number of seconds")
    return value
