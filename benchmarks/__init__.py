"""Benchmarks: ratios of ddmlib to what a user would write instead, measured side by side."""
