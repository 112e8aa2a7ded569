"""Data sets as whole tensors: the built-in ones, images in files, and clusters that replace classes.

Files pass through these modules: `sources` lists what is in a folder, an archive or a file of arrays; `splitting`
decides what trains and which class each image has; `decoding` makes pixels of files; `cache` keeps them on the disk for
all processes, which map them. `folders` connects these steps, and `reading` has the settings for them.

Other packages get a `Dataset` (images, labels, `ImageSpec`) from `load_dataset`. This package may import only `errors`
and `files`: it knows no network, no run and no setting.
"""
