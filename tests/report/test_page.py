"""The page: whole, escaped, and without anything to fetch."""

import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

from bundles import fitted
from tiny import tiny_model

from kvcar.bundle.summary import bits_by_layer
from kvcar.report.page import GeneratedText, PageRow, PageTable, render_page
from kvcar.report.plots import Point, bits_per_layer, quality_against_size

ROW = PageRow("5x", "4.98", "4,604", "54,194,376", "2,822", "20.655", "1.0040 ± 0.0010", "0.005", "96.2 %")


class Links(HTMLParser):
    """Collects everything that a browser would fetch."""

    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attributes):
        self.found += [
            value for name, value in attributes if name in ("src", "href", "xlink:href") and not value.startswith("#")
        ]


def page():
    layers = bits_by_layer(fitted(tiny_model("llama"), bits=3).plan)
    plots = {
        "Quality": quality_against_size([Point("5x", 4.98, 0.005, 1e-4), Point("8x", 7.9, 0.017, 3e-4)]),
        "Bits": bits_per_layer(layers, "bits"),
    }
    texts = [GeneratedText("full", "a <b>bold</b> claim & more", "1 byte"), GeneratedText("5x", "same", "1 byte")]
    return render_page(
        "Title",
        {"model": "tiny"},
        [PageTable("English", [ROW])],
        plots,
        "say <script>alert(1)</script>",
        texts,
        ["A note."],
    )


def test_the_page_fetches_nothing_and_escapes_what_models_say():
    html = page()
    parser = Links()
    parser.feed(html)
    assert parser.found == []
    assert not re.search(r"url\((?!#|&quot;#)|@import", html)
    assert "<script>" not in html
    assert "a &lt;b&gt;bold&lt;/b&gt; claim &amp; more" in html
    for value in (ROW.times_smaller, ROW.codec_bytes, ROW.pays_from_tokens, ROW.kl_divergence, "English", "A note."):
        assert value in html


def test_plots_are_pictures_of_their_numbers():
    svgs = re.findall(r"<svg.*?</svg>", page(), flags=re.DOTALL)
    assert len(svgs) == 2
    for svg in svgs:
        ET.fromstring(svg)
    assert "8x" in svgs[0]
    assert "keys" in svgs[1]
    assert svgs == re.findall(r"<svg.*?</svg>", page(), flags=re.DOTALL), "the same numbers draw the same picture"
