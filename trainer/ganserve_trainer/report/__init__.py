"""The record of a run (`history`), and its presentation: an HTML page, contact sheets, TensorBoard.

This package may import `settings`, `files` and `data.spec`. It neither trains nor measures: `train` and `evaluation`
pass it the values.
"""
