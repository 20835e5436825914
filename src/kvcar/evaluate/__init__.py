"""Measuring what a compressed cache saves and costs, always stepped through the cache."""
