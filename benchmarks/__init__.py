"""Benchmarks: one program per table of docs/performance.md, with shared helpers in `interleaved`."""
