"""Turns a generator's file of any maker into a served model: `ganserve-trainer import`.

`reading` opens the file as a `Source`: an ONNX graph, and how to run the original. `looking` finds out what its inputs
and its output mean, `rewriting` gives the graph the inputs and the output of a served model, and `command` does all of
it, shows the result, and publishes it. Within the trainer, only the command line imports this package.
"""
