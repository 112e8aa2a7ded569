"""Data sets as whole tensors: the built-in ones, folders of images, and clusters that replace classes.

Other packages get a `Dataset` (images, labels, `ImageSpec`) from `load_dataset`. This package may import only `errors`:
it knows no network, no run and no setting.
"""
