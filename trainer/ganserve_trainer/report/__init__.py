"""The record of a run (`history`), and how people see it: an HTML page, contact sheets, TensorBoard.

This package may import `settings`, `files` and `data.spec`. It trains and measures nothing: `train` and `evaluation`
pass it values.
"""
