"""Choosing the pages that a decode step attends to, from small summaries of their keys."""

from .dispatch import choose_pages
from .summaries import CHOSEN_SUMMARY, SUMMARIES, Summary

__all__ = ["CHOSEN_SUMMARY", "SUMMARIES", "Summary", "choose_pages"]
