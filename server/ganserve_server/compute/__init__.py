"""Runs a model on the CPU or on a GPU.

Knows neither queues nor requests nor files: it takes the bytes of a model and the images to make. May import only
`settings`.
"""
