"""What does the survey say of its systems? Table 1 of Tay et al. 2020, arXiv 2009.06732, third version.

Each of the 17 systems with the example that stands for it, and why a derived cell may differ from the printed one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Entry:
    """A row of the survey. spec: the example. complexity, decodable, classes: as printed; reasons: of cells that
    differ, by column."""

    name: str
    spec: str
    complexity: str
    decodable: bool
    classes: tuple[str, ...]
    reasons: Mapping[str, str] = field(default_factory=dict)


SHORTER = "the survey prints the cost in the length after compression or of a segment, this is in N"
BY_VALUE = "later tokens choose what earlier ones attend, although none is attended"

SURVEY: tuple[Entry, ...] = (
    Entry("Memory Compressed", "sources/memory-compressed.yaml", "N_c²", True, ("FP", "M"), {"time": SHORTER}),
    Entry("Image Transformer", "image-transformer-1d.yaml", "N·m", True, ("FP",)),
    Entry(
        "Set Transformer",
        "sources/set-transformer.yaml",
        "kN",
        False,
        ("M",),
        {
            "decodable": "sets have no order; this stage alone reads no later element, the first stage reads all",
        },
    ),
    Entry("Sparse Transformer", "sparse-transformer-strided.yaml", "N√N", True, ("FP",)),
    Entry(
        "Axial Transformer",
        "axial.yaml",
        "N√N",
        True,
        ("FP",),
        {
            "decodable": "this layer is the unmasked one; the autoregressive model is examples/axial_images.py",
        },
    ),
    Entry(
        "Longformer",
        "roles/longformer-projections.yaml",
        "N(k+m)",
        True,
        ("FP", "M"),
        {
            "decodable": "global rows attend later keys; without them, or cut to earlier keys, it is decodable",
        },
    ),
    Entry("ETC", "roles/etc-projections.yaml", "N_g²+N·N_g", False, ("FP", "M")),
    Entry("BigBird", "bigbird.yaml", "N", False, ("FP", "M")),
    Entry(
        "Routing Transformer",
        "selected/routing-transformer.yaml",
        "N√N",
        True,
        ("LP",),
        {
            "decodable": BY_VALUE,
        },
    ),
    Entry(
        "Reformer",
        "learned/reformer.yaml",
        "N log N",
        True,
        ("LP",),
        {
            "decodable": BY_VALUE,
        },
    ),
    Entry(
        "Sinkhorn Transformer",
        "sources/sinkhorn-causal.yaml",
        "B²",
        True,
        ("LP",),
        {
            "time": "the survey prints the product of one block; N / B are attended, and (N / B)² weighed",
            "classes": "the local blocks beside the sorted ones are a fixed pattern",
        },
    ),
    Entry("Linformer", "sources/linformer.yaml", "N", False, ("LR",)),
    Entry("Linear Transformer", "sources/linear-transformer.yaml", "N", True, ("KR",)),
    Entry("Performer", "sources/performer.yaml", "N", True, ("KR",)),
    Entry(
        "Synthesizer",
        "sources/synthesizer-dense.yaml",
        "N²",
        True,
        ("LR", "LP"),
        {
            "classes": "the dense form has full rank; the factored ones are of low rank",
        },
    ),
    Entry("Transformer-XL", "sources/transformer-xl.yaml", "N²", True, ("RC",)),
    Entry("Compressive", "sources/compressive.yaml", "N²", True, ("RC",)),
)

ORDERS: Mapping[str, str] = {
    "N_c²": "Θ(N_c²)",
    "N·m": "Θ(N)",
    "kN": "Θ(N)",
    "N√N": "Θ(N√N)",
    "N(k+m)": "Θ(N)",
    "N_g²+N·N_g": "Θ(N)",
    "N": "Θ(N)",
    "N log N": "Θ(N·log N)",
    "B²": "Θ(B²)",
    "N²": "Θ(N²)",
}
"""The printed complexities at fixed parameters, as orders."""
