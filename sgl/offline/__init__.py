"""Benchmarks of an engine in this process, without HTTP.

settings   flags: a benchmark's own, and with them all of the server's
runs       what both need: an engine, prompts, profiles, lines of results
latency    `sgl bench latency`: one batch at a time, its prefill and each decode step
throughput `sgl bench offline-throughput`: many requests at once
"""
