"""Draw the pictures of ``how-it-works.md``: ``python docs/drawings.py``. A test checks that they are what this file draws."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

IMAGES = Path(__file__).parent / "images"

# A panel of its own behind each picture, so that ink and ground always fit each other, whatever page shows them.
STYLE = """
text { font: 14px system-ui, -apple-system, 'Segoe UI', sans-serif; fill: #1f2328; }
.small { font-size: 12px; fill: #59636e; }
.name { font-weight: 600; }
.ground { fill: #ffffff; stroke: #d1d9e0; }
.arrow, .guide { stroke: #59636e; fill: none; stroke-width: 1.5; }
.guide { stroke-dasharray: 3 4; stroke-width: 1; }
.tip { fill: #59636e; }
.blue { fill: #cfe3ff; stroke: #2f74c0; }
.green { fill: #c9ecd3; stroke: #2f8a4c; }
.orange { fill: #ffdfbd; stroke: #b8691b; }
.exact { fill: #eceff2; stroke: #818b98; }
.none { fill: none; stroke: #8250df; stroke-dasharray: 4 3; }
@media (prefers-color-scheme: dark) {
text { fill: #e6edf3; }
.small { fill: #9aa4af; }
.ground { fill: #151b23; stroke: #3d444d; }
.arrow, .guide { stroke: #9aa4af; }
.tip { fill: #9aa4af; }
.blue { fill: #16375f; stroke: #5aa2f0; }
.green { fill: #17402a; stroke: #52b974; }
.orange { fill: #573512; stroke: #e09a4b; }
.exact { fill: #2a313a; stroke: #818b98; }
.none { stroke: #b98af5; }
}
"""


class Drawing:
    """An SVG picture that is put together from top left to bottom right."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self.parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" role="img">',
            f"<title>{escape(title)}</title>",
            f"<style>{STYLE}</style>",
            f'<rect class="ground" x="0.5" y="0.5" width="{width - 1}" height="{height - 1}" rx="8"/>',
        ]

    def box(
        self, x: float, y: float, width: float, height: float, colour: str, label: str = "", small: str = ""
    ) -> None:
        """Draw a box with a label in its middle and a smaller one below that."""
        self.parts.append(f'<rect class="{colour}" x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="3"/>')
        middle = x + width / 2
        if label:
            self.text(middle, y + height / 2 + (-2 if small else 5), label, anchor="middle")
        if small:
            self.text(middle, y + height / 2 + 15, small, "small", "middle")

    def text(self, x: float, y: float, words: str, style: str = "", anchor: str = "start") -> None:
        """Write a line of text."""
        self.parts.append(f'<text class="{style}" x="{x:g}" y="{y:g}" text-anchor="{anchor}">{escape(words)}</text>')

    def lines(self, x: float, y: float, words: Sequence[str], style: str = "small", anchor: str = "start") -> None:
        """Write lines below each other."""
        for place, line in enumerate(words):
            self.text(x, y + 17 * place, line, style, anchor)

    def arrow(self, *points: tuple[float, float]) -> None:
        """Draw an arrow along points, whose last leg is level or upright."""
        (x0, y0), (x1, y1) = points[-2:]
        back_x, back_y = (6 if x1 > x0 else -6 if x1 < x0 else 0), (6 if y1 > y0 else -6 if y1 < y0 else 0)
        path = " ".join(f"{x:g},{y:g}" for x, y in (*points[:-1], (x1 - back_x, y1 - back_y)))
        self.parts.append(f'<polyline class="arrow" points="{path}"/>')
        sides = [(x1 - back_x + s * back_y * 0.7, y1 - back_y + s * back_x * 0.7) for s in (1, -1)]
        tip = " ".join(f"{x:g},{y:g}" for x, y in ((x1, y1), *sides))
        self.parts.append(f'<polygon class="tip" points="{tip}"/>')

    def guide(self, x0: float, y0: float, x1: float, y1: float) -> None:
        """Draw a thin broken line, from a thing to a closer look at it."""
        self.parts.append(f'<line class="guide" x1="{x0:g}" y1="{y0:g}" x2="{x1:g}" y2="{y1:g}"/>')

    def svg(self) -> str:
        """Give the whole picture."""
        return "\n".join([*self.parts, "</svg>"]) + "\n"


def _sequence(d: Drawing, y: float) -> float:
    """Draw a sequence's tokens; returns where its third page begins."""
    for token in range(4):
        d.box(24 + 13 * token, y, 11, 40, "exact")
    for page in range(5):
        d.box(84 + 108 * page, y, 104, 40, "blue", "page" if page != 3 else "...")
    for token in range(16):
        d.box(634 + 13 * token, y, 11, 40, "exact")
    d.text(50, y - 12, "sinks", "name", "middle")
    d.text(352, y - 12, "pages of 64 tokens: packed codes", "name", "middle")
    d.text(737, y - 12, "window", "name", "middle")
    d.text(20, y + 58, "first 4, exact", "small")
    d.text(737, y + 58, "last 64 to 127 tokens, exact", "small", "middle")
    return 84 + 108 * 2


def overview() -> str:
    """The front page's picture: where tokens are, and what a page holds of them."""
    d = Drawing(868, 330, "A sequence's tokens in sinks, pages and window, and how a block of slots becomes codes")
    page = _sequence(d, 44)
    d.guide(page, 84, 24, 148)
    d.guide(page + 104, 84, 844, 148)
    d.text(24, 172, "in a page, for each of its tokens:", "small")
    for place, (layer, kind) in enumerate(((4, "keys"), (4, "values"), (5, "keys"), (5, "values"))):
        d.box(24, 184 + 30 * place, 130, 26, "blue", f"layer {layer}, {kind}")
    d.text(24, 320, "slots, side by side: a block", "small")
    d.arrow((162, 242), (210, 242))
    d.box(212, 210, 96, 64, "orange", "encoder")
    d.arrow((310, 242), (352, 242))
    d.box(354, 196, 96, 92, "green", "latents", "few, sorted")
    d.arrow((452, 242), (494, 242))
    d.box(496, 210, 104, 64, "orange", "quantiser")
    d.arrow((602, 242), (644, 242))
    for place, (bits, width) in enumerate(((7, 182), (5, 130), (4, 104), (2, 52))):
        d.box(646, 184 + 30 * place, width, 26, "blue", f"{bits} bits" if bits > 2 else "2")
    d.text(737, 320, "codes, packed", "small", "middle")
    d.text(406, 320, "encoder + quantiser + decoder: a codec", "small", "middle")
    return d.svg()


def slots() -> str:
    """A plan: which slots make which blocks."""
    d = Drawing(760, 330, "A plan: a grid of slots, six layers by two heads of keys and values, coloured by block")
    left, top, width, height = 92, 62, 74, 34
    for column, head in enumerate((0, 1, 0, 1)):
        d.text(left + width * column + 34 + 14 * (column > 1), 52, f"head {head}", "small", "middle")
    d.text(left + width, 30, "keys", "name", "middle")
    d.text(left + 3 * width + 14, 30, "values", "name", "middle")
    colours = [["blue"] * 4] * 3 + [["green", "green", "orange", "orange"]] * 2 + [["exact", "exact", "orange", "none"]]
    for layer, row in enumerate(colours):
        d.text(left - 12, top + height * layer + 22, f"layer {layer}", "small", "end")
        for column, colour in enumerate(row):
            d.box(left + width * column + 14 * (column > 1), top + height * layer, width - 5, height - 5, colour)
    x, y = left + 3 * width + 14 + 34, top + 5 * height + 15
    d.arrow((x, y), (x, y - 27))
    words = [
        ("blue", "block 0", "keys and values of three layers"),
        ("green", "block 1", "keys of two layers"),
        ("orange", "block 2", "values of three layers"),
        ("exact", "exact", "stored as they are, beside the blocks"),
        ("none", "reuse", "stores nothing, reads one of layer 4"),
    ]
    for place, (colour, name, meaning) in enumerate(words):
        d.box(430, 66 + 44 * place, 26, 26, colour)
        d.text(468, 77 + 44 * place, name, "name")
        d.text(468, 95 + 44 * place, meaning, "small")
    d.text(
        left - 60,
        300,
        "a slot: one layer, one head, key or value. The plan says for every slot where it is stored.",
        "small",
    )
    return d.svg()


def codec() -> str:
    """A codec: from a block's vectors to codes and back."""
    d = Drawing(
        868, 250, "A codec: vectors of a block through an encoder to latents, to codes, and back through a decoder"
    )
    y = 92
    steps = [
        ("blue", "block", "W numbers"),
        ("orange", "encoder", "W x R"),
        ("green", "latents", "R numbers"),
        ("orange", "quantiser", "steps, zeros"),
        ("blue", "codes", "1 to 8 bits"),
        ("orange", "decoder", "R x W"),
        ("blue", "block again", "W numbers"),
    ]
    for place, (colour, name, size) in enumerate(steps):
        tall = {"green": 66, "orange": 56}.get(colour, 110 if "block" in name else 50)
        d.box(24 + 118 * place, y - tall / 2 + 24, 96, tall, colour, name, size)
        if place:
            d.arrow((24 + 118 * place - 20, y + 24), (24 + 118 * place - 2, y + 24))
    d.text(24, 30, "a linear codec: one matrix each way; W is slots x head dim, R is smaller", "name")
    d.lines(
        24,
        204,
        [
            "Directions are chosen by what an error in them does to the model's output. Important latents get many bits, others few or none.",
            "Keys are coded before they are rotated by position (RoPE). The quantiser's steps fold into the decoder.",
        ],
    )
    return d.svg()


def page() -> str:
    """A page: segments, planes, bytes."""
    d = Drawing(868, 340, "A page: a row of segments, one for each block; a segment is a row of planes of bits")
    d.text(24, 32, "one page: 64 tokens of everything that the plan codes", "name")
    for x, width, colour, name in (
        (24, 340, "blue", "block 0"),
        (368, 200, "green", "block 1"),
        (572, 160, "orange", "block 2"),
        (736, 108, "exact", "exact slots"),
    ):
        d.box(x, 44, width, 44, colour, name)
    d.guide(24, 88, 24, 136)
    d.guide(364, 88, 844, 136)
    d.text(34, 128, "its segment: planes of 1, 2, 4 or 8 bits", "name")
    for x, width, name, latents in (
        (24, 420, "plane of 4 bits", "latents 0 to 9, low bits"),
        (448, 120, "plane of 1 bit", "latents 0 to 3, bit 4"),
        (572, 272, "plane of 2 bits", "latents 10 to 17"),
    ):
        d.box(x, 140, width, 48, "blue", name, latents)
    d.guide(448, 188, 24, 236)
    d.guide(568, 188, 264, 236)
    d.text(844, 228, "byte [row 3, latent 2] of that plane: a bit each of eight tokens", "name", "end")
    for place in range(8):
        d.box(24 + 76 * place, 240, 72, 34, "blue", f"token {3 + 8 * place}")
    d.lines(
        24,
        302,
        [
            "A code of 5 bits is a plane of 4 and a plane of 1. Packed along tokens, a plane unpacks with one shift and one mask.",
            "Segments start at multiples of 16 bytes. A page leaves the window for all layers at once, so a block may span layers.",
        ],
    )
    return d.svg()


def attention() -> str:
    """A decode step and a chunk: what a layer's attention reads."""
    d = Drawing(868, 300, "Attention of a layer over sinks, pages, window and the tokens of the pass")
    d.box(24, 44, 100, 40, "exact", "sinks")
    d.box(134, 44, 420, 40, "blue", "pages, a tile at a time")
    d.box(564, 44, 150, 40, "exact", "window")
    d.box(724, 44, 120, 40, "green", "this pass")
    d.box(134, 130, 200, 48, "orange", "decode keys, rotate", "score, forget")
    d.box(354, 130, 200, 48, "orange", "sum values as latents", "decode the sum once")
    d.arrow((234, 86), (234, 128))
    d.arrow((454, 86), (454, 128))
    d.box(24, 214, 820, 40, "exact", "one softmax, merged by the largest score and the mass of each part")
    for x, y in ((74, 84), (234, 178), (454, 178), (639, 84), (784, 84)):
        d.arrow((x, y + 2), (x, 212))
    d.text(
        24,
        278,
        "The past's keys and values never exist at once. A step has few query rows, a chunk of a prompt has many.",
        "small",
    )
    d.text(24, 30, "one coded layer", "name")
    return d.svg()


def bundle() -> str:
    """From a model and a text to a cache."""
    d = Drawing(868, 250, "A model and a text are fitted to a bundle, which is attached to the model")
    d.box(24, 48, 120, 44, "exact", "model")
    d.box(24, 108, 120, 44, "exact", "text")
    d.arrow((146, 70), (196, 70), (196, 98), (238, 98))
    d.arrow((146, 130), (196, 130), (196, 104), (238, 104))
    d.box(240, 62, 130, 78, "orange", "fit", "blocks, bits, codecs")
    d.arrow((372, 101), (422, 101))
    d.box(424, 36, 190, 130, "blue")
    d.text(519, 58, "bundle", "name", "middle")
    d.lines(
        519, 84, ["plan.json: the plan", "codecs.safetensors: matrices", "README.md: a model card"], anchor="middle"
    )
    d.text(519, 150, "a folder, or on the hub", "small", "middle")
    d.arrow((616, 101), (666, 101))
    d.box(668, 62, 176, 78, "orange", "attach", "hooks on the same model")
    d.lines(
        24,
        200,
        [
            "A bundle is tied to its model by its geometry and a fingerprint of its weights; another model is refused.",
            "While it is attached, generate makes compressed caches. Codecs exist once, beside all caches, like weights.",
        ],
    )
    return d.svg()


PICTURES = {
    "overview": overview,
    "slots": slots,
    "codec": codec,
    "page": page,
    "attention": attention,
    "bundle": bundle,
}


def main() -> None:
    """Write all pictures."""
    for name, draw in PICTURES.items():
        (IMAGES / f"{name}.svg").write_text(draw(), encoding="utf-8")


if __name__ == "__main__":
    main()
