"""Serving engines: compressed pages in vLLM, records of stored prefixes for vLLM, LMCache and SGLang.

Nothing else of kvcar imports this room, and each engine is imported by its own files alone.
"""
