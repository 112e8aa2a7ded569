"""How good a generator is: metrics on the features of a network that is trained on the real images (the judge).

The command line calls `evaluate.evaluate`; a run in training measures itself by `evaluate.quick_measure`. This package
must not import `export`.
"""
