"""Measure the latency and throughput of a bundle, and compare two measurements."""
