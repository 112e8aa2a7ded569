"""Generators and discriminators, built from the settings for the images of a data set, and what images pass on the way.

Neighbours call `build_generator` and `build_discriminator`. This package may import `settings`, `errors` and the
image's specification in `data`; it knows no loss, no optimiser and no run.
"""
