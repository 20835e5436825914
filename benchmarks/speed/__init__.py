"""What the benchmarks of speed share: whose turn it is, timing, figures of many timings, the device's own limits."""
