"""Kernels in C for CPUs, compiled on first use and called through ctypes."""

from .build import Compiler, find_compiler, native_library

__all__ = ["Compiler", "find_compiler", "native_library"]
