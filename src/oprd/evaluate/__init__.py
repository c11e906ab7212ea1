"""Sampling benchmarks, verifying answers, counting."""
