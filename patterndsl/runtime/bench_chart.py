"""How do results of the bench look as bars? A panel for each measure, a group for each pattern, a bar for each rival.

It takes them in the form of JSON, so that a picture can be drawn again from the file of a run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from patterndsl.show.bars import Bar, Chart, Group, Panel
from patterndsl.show.palette import Tone

_LEGEND: tuple[tuple[Tone, str], ...] = (("both", "dense SDPA"), ("second", "FlexAttention"), ("mixed", "others"))
_PANELS = (("forward", "Forward"), ("training", "Forward and backward"))


def chart(data: Mapping[str, Any]) -> Chart:
    """The picture of what `patterndsl bench` writes: `patterns` with their entries, sizes, machine, versions, date."""
    panels = []
    for measure, title in _PANELS:
        groups = [_group(pattern, measure) for pattern in data["patterns"]]
        shown = tuple(group for group in groups if group.bars)
        if shown:
            panels.append(Panel(title, shown))
    tones = {bar.tone for panel in panels for group in panel.groups for bar in group.bars}
    legend = tuple(item for item in _LEGEND if item[0] in tones)
    return Chart("How many times as long others take", _lines(data), "patterndsl", legend, tuple(panels))


def _lines(data: Mapping[str, Any]) -> tuple[str, str]:
    machine, versions = data["machine"], data["versions"]
    where = machine.get("gpu") or f"{machine['threads']} threads of {machine['cpu']}"
    sizes = f"N {data['n']:,}, {data['heads']} heads of {data['head_dim']}, {data['dtype']}"
    return f"{sizes}; {where}", f"PyTorch {versions['torch']}; {data['date'][:10]}; medians of rounds in turns"


def _group(pattern: Mapping[str, Any], measure: str) -> Group:
    ours, *rivals = pattern["contest"]["entries"]
    timing = ours[measure]
    bars = tuple(_bar(entry, measure) for entry in rivals if entry[measure] and entry[measure]["ratio"])
    text = "" if timing is None else f"patterndsl {_seconds(timing['seconds']['median'])}"
    return Group(pattern.get("name") or pattern["spec"], text, bars)


def _bar(entry: Mapping[str, Any], measure: str) -> Bar:
    label, timing = entry["label"], entry[measure]
    tone: Tone = "both" if label.startswith("dense SDPA") else "second" if label == "FlexAttention" else "mixed"
    seconds = _seconds(timing["seconds"]["median"])
    words: Sequence[str] = (seconds, label) if tone == "mixed" else (seconds,)
    return Bar(tone, timing["ratio"]["median"], ", ".join(words))


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"
