"""Benchmarks of fastpeft's ops and the GPU check-in. Run from a checkout: `python -m benchmarks.checkin --out DIR`."""
