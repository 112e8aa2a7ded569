"""Generators and discriminators, built from the settings for the images of a data set, and differentiable augmentation.

Neighbours call `build_generator` and `build_discriminator`. This package may import `settings`, `errors` and
`data.spec`, what a data set's images are; it knows no loss, no optimiser and no run.
"""
