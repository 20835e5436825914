"""Decode steps as CUDA graphs: a whole step of the model is captured once and replayed for every token."""

from .steps import StepGraphs

__all__ = ["StepGraphs"]
