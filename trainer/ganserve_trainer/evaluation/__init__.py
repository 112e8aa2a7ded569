"""Measures the quality of a generator, by metrics on the features of a network trained on the real images (the judge).

The command line calls `evaluate.evaluate`; during training, a run uses `evaluate.quick_measure`. This package
must not import `export`.
"""
