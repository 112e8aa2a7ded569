"""From a checkpoint, or from any torch module, to a version in a model repository, in fp32, fp16 or int8.

`export_module` is for programs of other people; the command line calls `publish.export` and `variants.export`. Only
the command line imports this package; it may import all others that it needs.
"""

from ganserve_trainer.export.publish import export_module

__all__ = ["export_module"]
