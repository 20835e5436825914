"""The fit: statistics, then blocks, then bits, then codecs.

``kvcar.fit(model, tokenizer)`` is ``kvcar.fit.fit.fit``.
"""

from ..registry import callable_package

callable_package(__name__, "fit")
