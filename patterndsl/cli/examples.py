"""What does each command's help end with? Examples, and what to know of its output."""

EPILOGS = {
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
