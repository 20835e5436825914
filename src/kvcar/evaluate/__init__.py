"""Measuring what a compressed cache saves and costs, always stepped through the cache.

``kvcar.evaluate(model, bundle, tokenizer, text)`` is ``kvcar.evaluate.fidelity.evaluate``.
"""

from ..registry import callable_package

callable_package(__name__, "fidelity")
