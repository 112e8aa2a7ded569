"""Exports a checkpoint, or any torch module, as a version in a model repository, in fp32, fp16 or int8.

`export_module` is for users' programs; the command line calls `publish.export` and `variants.export`. Within the
trainer, only the command line and `importing` import this package. It may import any other package that it needs.
"""

from ganserve_trainer.export.inputs import Attribute, Attributes, Label, Latent, Truncation
from ganserve_trainer.export.publish import export_module

__all__ = ["Attribute", "Attributes", "Label", "Latent", "Truncation", "export_module"]
