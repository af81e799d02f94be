"""Views of positions hold what indexing holds, whatever the order in memory, and what is written to them arrives."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from patterndsl.lower.geometry import Axis, Geometry, Side
from patterndsl.runtime.views import Places

T = 24
GEOMETRIES = {
    "all": Geometry((), Side(0, (Axis(24, 1),)), Side(0, (Axis(24, 1),))),
    "slice": Geometry((), Side(3, (Axis(7, 1),)), Side(0, (Axis(1, 1),))),
    "one": Geometry((), Side(5, (Axis(1, 1),)), Side(0, (Axis(1, 1),))),
    "blocks": Geometry((Axis(4, 6),), Side(0, (Axis(6, 1),)), Side(0, (Axis(6, 1),))),
    "residues": Geometry((Axis(4, 1),), Side(0, (Axis(6, 4),)), Side(0, (Axis(6, 4),))),
    "tiles of a grid": Geometry((Axis(2, 12), Axis(2, 3)), Side(0, (Axis(2, 6), Axis(3, 1))), Side(0, (Axis(1, 1),))),
    "singles": Geometry((Axis(24, 1),), Side(0, (Axis(1, 1),)), Side(0, (Axis(1, 1),))),
}


def tensors(width: int | None = 2) -> dict[str, Tensor]:
    """[2, 3, T, width], or [2, 3, T] for None."""
    rest = () if width is None else (width,)
    plain = torch.randn(2, 3, T, *rest)
    return {
        "in order": plain,
        "heads last": torch.randn(2, T, 3, *rest).transpose(1, 2),
        "every other head": torch.randn(2, 6, T, *rest)[:, ::2],
        "one row": plain[1:],
        "one head": plain[:, 1:2],
        "narrowed": torch.randn(2, 3, T + 5, *rest)[:, :, 4:-1],
    }


def indexed(x: Tensor, geometry: Geometry) -> Tensor:
    places = torch.from_numpy(geometry.group_starts()[:, None] + geometry.q.places())
    return x.flatten(0, 1)[:, places]


@pytest.mark.parametrize("width", [None, 2])
@pytest.mark.parametrize("order", tensors())
@pytest.mark.parametrize("name", GEOMETRIES)
def test_reads_and_writes(name: str, order: str, width: int | None) -> None:
    geometry, x = GEOMETRIES[name], tensors(width)[order]
    places = Places(geometry.groups, geometry.q)
    expected = indexed(x, geometry)
    for _ in range(2):  # as found, and as remembered
        assert torch.equal(places.grouped(x), expected)
    into = places.into(x)
    into.copy_(places.fit(-expected, into))
    assert torch.equal(indexed(x, geometry), -expected)


@pytest.mark.parametrize("name", GEOMETRIES)
def test_a_result_is_adopted_only_where_it_lies_as_all_positions_do(name: str) -> None:
    geometry = GEOMETRIES[name]
    places = Places(geometry.groups, geometry.q)
    whole = torch.randn(2, 3, T, 2)
    part = places.grouped(whole)
    adopted = places.adopted(part, whole.shape[:3])
    if adopted is not None:
        assert torch.equal(adopted, whole)
        assert adopted.data_ptr() == whole.data_ptr()
    assert (adopted is not None) == (geometry.num_rows == T and name != "tiles of a grid")
    other = places.adopted(part.clone(memory_format=torch.contiguous_format), whole.shape[:3])
    assert other is None or torch.equal(other, whole)
