"""Fixtures that the whole suite shares."""

from __future__ import annotations

import os

# Loading by a hub id must fail at once in tests, not after retries.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
