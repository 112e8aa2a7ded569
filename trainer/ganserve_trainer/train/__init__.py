"""One training run: its steps, its state on disk, its alarms and its end; and sweeps over many runs.

The command line calls `loop.train`; evaluation and export get a run's state from `checkpoints.load_checkpoint`. This
package must not import `evaluation` or `export`: a run gets the function that measures it as an argument.
"""
