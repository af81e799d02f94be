"""How does a pattern run on kernels of our own? Its predicate becomes Triton source, its tiles become lists of work.

Without Triton: `predicate` writes the source, and `asked` adds what it looks up; `lists` and `work` are of tiles that
stay, `told_lists` of those that a call tells, by what `verdicts` writes and `told_tables` places; `shapes` chooses
blocks, and `calls` is one call. `attention` runs whole patterns so, `passes` pieces of plans, `steps` decodes.

Modules with kernels, or that launch them, import Triton, and are imported when one runs: `launch` with `forward`,
`backward`, `source`, `functions` and `rows`, by `places` in lists and `descriptors` of tensors; `launch_hopper` with
`pipeline`, `hopper` and `hopper_backward`, where `shapes` chooses them; `slot_passes` with `slot_kernels`, `keys` of
single keys, `own` of a query's own, `hashing` of labels and `sorting` of positions by them, `choosing` of blocks,
`told_kernels` of lists with `told_functions`, `decode`, each through `device.launcher`; and `tuning` for a calibration
alone. What all of them need of tensors is in `memory`.
"""
