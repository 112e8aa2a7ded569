"""Generators and discriminators, built from the settings for the images of a data set, and differentiable augmentation.

Other packages call `build_generator` and `build_discriminator`. This package may import `settings`, `errors` and
`data.spec`; it knows no loss, no optimiser and no run.
"""
