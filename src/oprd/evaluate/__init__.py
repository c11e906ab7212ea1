"""Benchmarks: sampling, checking answers, scores."""
