"""One training run: its steps, its state on disk, its alarms and its end; and sweeps over many runs.

`loop.train` is what the command line calls; `checkpoints.load_checkpoint` gives a run's state to evaluation and export.
This package may import everything but `evaluation` and `export`: a run gets its measurements as a function.
"""
