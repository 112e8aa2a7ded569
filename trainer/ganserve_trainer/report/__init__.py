"""What a run remembers of itself (`history`), and how people see it: an HTML page, contact sheets, TensorBoard.

This package may import `settings`, `files` and the image's specification in `data`. It trains and measures nothing:
`train` and `evaluation` hand it values.
"""
