"""From a checkpoint, or any torch module, to a version in a model repository, in fp32, fp16 or int8.

This package may import every other one; only the command line imports it.
"""
