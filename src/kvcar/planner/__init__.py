"""Deciding what is coded together and with how many bits. Reads numbers, never a model."""
