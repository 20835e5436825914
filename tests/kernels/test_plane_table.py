"""Planes as tables of words: every word has latents of the same planes, and lies in its page."""

import pytest
import torch

from kvcar.kernels.plane_table import highest_codes, segment_fields, spread, word_fields, word_slots
from kvcar.layout import aligned, coded_segment
from kvcar.plan import BitGroup

MIXES = {
    "odd": [(8, 3), (7, 1), (6, 5), (5, 2), (4, 7), (3, 1), (2, 6), (1, 9)],
    "one latent": [(1, 1)],
    "whole words": [(6, 8), (4, 4)],
    "raw latents first": [(16, 3), (5, 6)],
}


@pytest.fixture(params=list(MIXES), ids=str)
def groups(request):
    return [BitGroup(bits=bits, count=count) for bits, count in MIXES[request.param]]


@pytest.mark.parametrize("page_tokens", [32, 64, 96])
def test_words_hold_the_bytes_of_their_latents_and_lie_in_the_page(groups, page_tokens):
    segment = coded_segment(groups, page_tokens, 16)
    fields, slots = segment_fields(segment), word_slots(segment)
    words = word_fields(spread(fields, slots))
    place = torch.tensor([0, 2, 1, 3])  # the byte of each slot of a word
    for klass, width in enumerate((1, 2, 4, 8)):
        rows = torch.arange(page_tokens * width // 8)
        offset, stride, shift, span, mask = words[klass]
        start = offset[:, None] + rows * stride[:, None]
        ends = (start + span[:, None]) & ~3
        assert int(start.min()) >= 0
        assert int(ends.max()) + 4 <= aligned(segment.end)
        for latent, slot in enumerate(slots.tolist()):
            word, byte = slot // 4, int(place[slot % 4])
            if fields[klass, 0, latent] < 0:
                assert mask[word] == 0
                continue
            assert torch.equal(start[word] + byte, fields[klass, 0, latent] + rows * fields[klass, 1, latent])
            assert byte <= span[word]
            assert (int(mask[word]) >> 8 * byte) & 255 == (2**width - 1) << int(shift[word])


def test_slots_are_all_different_and_pad_little(groups):
    segment = coded_segment(groups, 64, 0)
    slots = word_slots(segment)
    assert len(set(slots.tolist())) == segment.latents
    assert spread(segment_fields(segment), slots).shape[-1] <= segment.latents + 3 * len(groups)


def test_highest_codes():
    fields = segment_fields(coded_segment([BitGroup(bits=b, count=1) for b in (8, 7, 6, 5, 4, 3, 2, 1)], 64, 0))
    assert highest_codes(fields).tolist() == [255, 127, 63, 31, 15, 7, 3, 1]
