"""Keys that are no tokens of the sequence: how layers make them, one source in each module.

Every source is a module that is told its settings and called with a `Sequence`; it returns key and value. What each
kind of source is called, and where its keys stand, is in `sema.sources`.
"""
