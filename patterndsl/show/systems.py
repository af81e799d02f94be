"""How do systems look side by side? One page of HTML, a card with a picture and the figures of each."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from patterndsl.show.image import png_bytes
from patterndsl.show.palette import DARK, LIGHT, variables

PIXEL = 2


@dataclass(frozen=True)
class Card:
    """A system: figures by their names, notes, and a mask for each source of keys."""

    name: str
    figures: Mapping[str, str]
    notes: Sequence[str]
    masks: Mapping[str, Sequence[Sequence[bool]]]


def systems_page(title: str, cards: Sequence[Card]) -> str:
    """The page, which needs nothing but itself. Masks are drawn with queries downwards and keys to the right."""
    body = "\n".join(map(_card, cards))
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)}</title>
<style>
:root {{ color-scheme: light dark; {variables(LIGHT)} }}
@media (prefers-color-scheme: dark) {{ :root {{ {variables(DARK)} }} }}
body {{ font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 78rem; padding: 0 1rem;
  background: Canvas; color: CanvasText; }}
h1 {{ font-size: 1.3rem; }}
main {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(21rem, 1fr)); gap: 1rem; }}
article {{ border: 1px solid color-mix(in srgb, CanvasText 20%, transparent); border-radius: 8px; padding: 1rem; }}
h2 {{ font-size: 1.05rem; margin: 0 0 .6rem; }}
figure {{ display: inline-block; margin: 0 .8rem .6rem 0; vertical-align: top; }}
figure img {{ display: block; image-rendering: pixelated; max-width: 100%;
  border: 1px solid color-mix(in srgb, CanvasText 25%, transparent); }}
figcaption {{ font-size: .8rem; opacity: .75; }}
dl {{ display: grid; grid-template-columns: max-content 1fr; gap: .1rem .8rem; margin: 0; font-size: .88rem; }}
dt {{ opacity: .7; }} dd {{ margin: 0; overflow-wrap: anywhere; }}
p {{ font-size: .82rem; margin: .6rem 0 0; opacity: .85; }}
</style></head>
<body><h1>{html.escape(title)}</h1>
<p>Derived from specs. Pictures: queries downwards, keys to the right, small parameters; * differs from the survey.</p>
<main>
{body}
</main></body></html>
"""


def _card(card: Card) -> str:
    figures = "".join(
        f"<dt>{html.escape(name)}</dt><dd>{html.escape(text)}</dd>" for name, text in card.figures.items()
    )
    pictures = "".join(_picture(card.name, name, mask) for name, mask in card.masks.items())
    notes = "".join(f"<p>{html.escape(note)}</p>" for note in card.notes)
    missing = "" if pictures else "<p>What it attends is decided in each call.</p>"
    return f"<article><h2>{html.escape(card.name)}</h2>{pictures}{missing}<dl>{figures}</dl>{notes}</article>"


def _picture(system: str, name: str, mask: Sequence[Sequence[bool]]) -> str:
    from PIL import Image

    kept = np.array(mask, dtype=bool)
    if kept.size == 0:
        return ""
    colors = np.where(kept[..., None], np.array([38, 99, 155], np.uint8), np.array([244, 244, 242], np.uint8))
    image = Image.fromarray(colors.astype(np.uint8), "RGB")
    image = image.resize((kept.shape[1] * PIXEL, kept.shape[0] * PIXEL), Image.Resampling.NEAREST)
    data = base64.b64encode(png_bytes(image)).decode()
    caption = f"<figcaption>{html.escape(name)}</figcaption>" if name else ""
    alt = html.escape(f"what {system} attends" + (f" of {name}" if name else ""))
    return f'<figure><img alt="{alt}" src="data:image/png;base64,{data}">{caption}</figure>'
