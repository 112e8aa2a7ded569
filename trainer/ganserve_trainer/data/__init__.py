"""Data sets as whole tensors: the built-in ones, folders of images, and clusters that stand in for classes.

Neighbours get a `Dataset` (images, labels, `ImageSpec`) from `load_dataset`. This package may import `errors`
only: it knows no network, no run and no setting.
"""
