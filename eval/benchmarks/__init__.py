"""Benchmarks of diffdistill itself, each a command of its own."""
