"""A plan with its codecs, tied to a model: in memory, on disk and on the hub."""

from .bundle import Bundle, CodedBlock
from .files import CODECS_FILE, PLAN_FILE, check_target
from .origin import FitProvenance, ModelIdentity, identify
from .summary import bits_by_layer, summarise_blocks, windows_in_words

__all__ = [
    "CODECS_FILE",
    "PLAN_FILE",
    "Bundle",
    "CodedBlock",
    "FitProvenance",
    "ModelIdentity",
    "bits_by_layer",
    "check_target",
    "identify",
    "summarise_blocks",
    "windows_in_words",
]
