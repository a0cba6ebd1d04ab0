"""The scoring core: prompt + candidates -> token ids -> one padding-free row -> per-token log-ratios.

It serves training, torch inference and the exported graph, and imports nothing of the package's other folders.
"""
