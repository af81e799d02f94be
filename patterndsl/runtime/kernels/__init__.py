"""How does a pattern run on kernels of our own? Its predicate becomes Triton source, its tiles become lists of work.

`predicate` writes the source and `work` the lists, both without Triton; the modules that import it (`functions`,
`rows`, `forward`, `backward`) are imported by `launch` when a kernel runs, and `hopper` where `shapes` chooses it.
"""
