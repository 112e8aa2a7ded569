"""One training run: its steps, its state on disk, its alarms and its end; and sweeps over many runs.

`loop.train` is what the command line calls; `checkpoints.load_checkpoint` gives a run's state to evaluation and export.
This package must not import `evaluation` or `export`: a run gets the function that measures it as an argument.
"""
