"""All sources of a layer: the modules that make keys, and what is remembered from one segment to the next."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from patterndsl.diagnostics import input_error, nearest
from patterndsl.source.compress import Attend, Compress
from patterndsl.source.memory import Memory
from patterndsl.source.named import Named
from patterndsl.source.pool import Pool
from patterndsl.source.project import Project
from patterndsl.source.sequence import Keys, Sequence
from patterndsl.source.sort import Sort
from patterndsl.source.state import State

Settings = Mapping[str, Any]
"""What a source is told, see `sema.sources`."""

MAKERS: Mapping[str, Callable[..., nn.Module]] = {"memory": Memory, "pool": Pool, "project": Project, "sort": Sort}
"""Sources that are made of the sequence alone."""


@dataclass(frozen=True, slots=True)
class Told:
    """A source as a layer is told of it. is_attended: whether its keys are asked for, or just what it remembers."""

    name: str
    kind: str
    settings: Settings
    is_attended: bool = True


class Sources(Named):
    """The modules of a layer's sources by name. It is called with the sequence, and gives each source its keys."""

    def __init__(self, told: tuple[Told, ...], dim: int, kv_heads: int, head_dim: int) -> None:
        super().__init__()
        self.told = told
        self.dim = dim
        for item in told:
            if item.kind in MAKERS:
                self[item.name] = MAKERS[item.kind](dim, kv_heads, head_dim, **item.settings)
            elif item.kind == "compress":
                wanted = {name: item.settings[name] for name in ("rate", "by", "loss")}
                self[item.name] = Compress(dim, **wanted)

    def of_kind(self, *kinds: str) -> list[Told]:
        """Those made by one of these kinds."""
        return [item for item in self.told if item.kind in kinds]

    @property
    def is_recurrent(self) -> bool:
        """Whether a state goes from one segment to the next."""
        return bool(self.of_kind("recall"))

    def forward(self, sequence: Sequence, state: State | None, given: Mapping[str, Tensor]) -> dict[str, Keys]:
        """The keys of each source. given: states [B, T, dim] of the sequences that the caller brings.

        Raises InputError: E501 where such a sequence, or the state, is missing or unknown.
        """
        crossed = [item.name for item in self.of_kind("cross")]
        for name in given:
            if name not in crossed:
                near = nearest(str(name), crossed)
                help = f"did you mean `{near}`?" if near else "sequences are given to sources made by `cross`"
                raise input_error("E501", f"the pattern has no source `{name}` that a caller gives", help)
        found: dict[str, Keys] = {}
        for item in self.told:
            if not item.is_attended:
                continue
            if item.kind in MAKERS:
                found[item.name] = self[item.name](sequence)
            elif item.kind == "cross":
                if item.name not in given:
                    help = f"give sources={{{item.name!r}: states [B, T, {self.dim}]}}"
                    raise input_error("E501", f"source `{item.name}` is missing: it is another sequence", help)
                found[item.name] = sequence.project(given[item.name])
            else:
                if state is None:
                    help = "state = layer.init_state(batch); out, state = layer(x, state)"
                    raise input_error("E501", f"source `{item.name}` recalls earlier segments: no state is given", help)
                held = state.recalled if item.kind == "recall" else state.compressed
                found[item.name] = sequence.project(held[item.name])
        return found

    def start(self, batch: int, like: Tensor) -> State:
        """Nothing to be remembered yet."""
        none = like.new_zeros((batch, 0, self.dim))
        recalls, compressed = ([item.name for item in self.of_kind(kind)] for kind in ("recall", "compress"))
        usage = dict.fromkeys(self.used, none[..., 0])
        return State(
            dict.fromkeys(recalls, none), dict.fromkeys(compressed, none), dict.fromkeys(compressed, none), usage
        )

    @property
    def used(self) -> list[str]:
        """The recalled sources whose states are compressed by how much they are attended."""
        return [item.settings["past"] for item in self.of_kind("compress") if item.settings["by"] == "most_used"]

    def after(
        self,
        sequence: Sequence,
        state: State,
        usage: Mapping[str, Tensor],
        attend: Callable[[], Attend],
    ) -> tuple[State, dict[str, Tensor]]:
        """What is remembered after a segment, and the losses of compressions while the layer trains.

        usage: the attention that each recalled state had in this segment, [B, T]. attend: makes what the segment's
        queries read of states alone, for the loss.
        """
        recalled, compressed, waiting, attended = {}, {}, {}, dict(state.usage)
        losses: dict[str, Tensor] = {}
        gone: dict[str, Tensor] = {}
        for item in self.of_kind("recall"):
            past = state.recalled[item.name]
            seen = torch.cat([past, sequence.states.detach().to(past.dtype)], 1)
            cut = max(0, seen.shape[1] - item.settings["size"])
            recalled[item.name], gone[item.name] = seen[:, cut:], seen[:, :cut]
            if item.name in attended:
                new = seen.new_zeros(seen.shape[:2])
                new[:, : past.shape[1]] = usage[item.name]
                before = pad(state.usage[item.name], (0, sequence.length))
                attended[item.name] = before + pad(new, (before.shape[1] - new.shape[1], 0))
        for item in self.of_kind("compress"):
            module, rate, name = self[item.name], item.settings["rate"], item.settings["past"]
            assert isinstance(module, Compress)
            old = torch.cat([state.waiting[item.name], gone[name]], 1)
            whole = old.shape[1] // rate * rate
            old, waiting[item.name] = old[:, :whole], old[:, whole:]
            new = module(old, attended[name][:, :whole] if name in attended else None)
            attended |= {name: attended[name][:, whole:]} if name in attended else {}
            compressed[item.name] = torch.cat([state.compressed[item.name], new.detach()], 1)[
                :, -item.settings["size"] :
            ]
            if sequence.training and module.has_loss and whole:
                losses[item.name] = module.loss(old, new, attend())
        return State(recalled, waiting, compressed, attended), losses
