"""Benchmarks: workloads, peers, timing, reports."""
