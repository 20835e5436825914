"""The range coding of ``docs/format.md``, written down once more from its words, number by number."""

import math
from decimal import Decimal, localcontext

import constriction
import numpy as np
import pytest
from test_codes import gaussian_codes

from kvcar.context.entropy import encode_codes


def distribution(table, u):
    place = min(abs(u) * 16, 320.0)
    index = int(place)
    above = table[min(index + 1, 320)]
    upper = table[index] + (place - index) * (above - table[index])
    return 1.0 - upper if u < 0 else upper


def constants():
    with localcontext(prec=28):
        table = [float(1 / (1 + (-Decimal(i) / 16).exp())) for i in range(321)]
        scales = [float(Decimal(2) ** (Decimal(i) / 16) / 16) for i in range(192)]
    means = [
        math.floor(2048 * math.fsum(1.0 - distribution(table, (j + 0.5) / s) for j in range(1024))) for s in scales
    ]
    return table, scales, means


def specified(codes, bits):
    """Words of the range coder, by the rules of the document."""
    table, scales, means = constants()
    encoder = constriction.stream.queue.RangeEncoder()
    counts = [[[0] * 2**b for _ in range(5)] for b in bits]
    start = 0
    while start < len(codes):
        stop = min(len(codes), start + max(16, start // 2))
        run = codes[start:stop].astype(int).tolist()
        middle = []
        for b, own in zip(bits, counts, strict=True):
            n = sum(map(sum, own))
            q = 4 * (sum(x * own[k][x] for k in range(5) for x in range(2**b)) + 2 * (2**b // 2))
            middle.append((2 * q + n + 2) // (2 * (n + 2)))
        distances, overall = [], []
        for b, own, m in zip(bits, counts, middle, strict=True):
            d = [256 * sum(own[k][x] * abs(4 * x - m) for x in range(2**b)) for k in range(5)]
            distances.append(d)
            overall.append((sum(d) + 2 * max(1024 * 2**b // 10, 409)) // (sum(map(sum, own)) + 2))
        weights = []
        for r, b in enumerate(bits):
            alike = [i for i in range(len(bits)) if bits[i] == b]
            weights.append([])
            for k in range(5):
                found = sum(distances[i][k] for i in alike)
                expected = sum(sum(counts[i][k]) * overall[i] for i in alike)
                g = 1024 * (found + 1024) // (expected + 1024)
                e = (distances[r][k] + 64 * (overall[r] * g // 1024)) // (sum(counts[r][k]) + 64)
                scale = next((s for s, mean in zip(scales, means, strict=True) if mean >= e), scales[-1])
                inner = [distribution(table, (x - 0.5 - middle[r] / 4) / scale) for x in range(1, 2**b)]
                edges = [0.0, *inner, 1.0]
                weights[r].append([counts[r][k][x] + 128 * (edges[x + 1] - edges[x]) for x in range(2**b)])
        loud = [0] * len(run)
        for first in range(0, len(bits), 64):
            total = sum(loud)
            context = [sum(100 * len(run) * a > t * total for t in (75, 90, 105, 125)) for a in loud]
            group = range(first, min(first + 64, len(bits)))
            for r in group:
                for k in range(5):
                    own = [token[r] for token, c in zip(run, context, strict=True) if c == k]
                    model = constriction.stream.model.Categorical(np.array(weights[r][k]), perfect=False)
                    encoder.encode(np.array(own, dtype=np.int32), model)
            for t, token in enumerate(run):
                for r in group:
                    counts[r][context[t]][token[r]] += 1
                loud[t] += sum(min(abs(token[r] - (middle[r] + 2) // 4), 2) for r in group)
        start = stop
    return encoder.get_compressed().astype("<u4").tobytes()


@pytest.mark.parametrize("tokens", [1, 16, 17, 90])
def test_the_coder_follows_the_document(tokens):
    bits = [8, 6, 6, 4, 4, 3, 2, 1] + [3] * 130
    codes = gaussian_codes(tokens, bits, seed=3, loud=0.5)
    assert encode_codes(codes, bits) == specified(codes, bits)
