"""From a checkpoint, or from any torch module, to a version in a model repository, in fp32, fp16 or int8.

`export_module` is for programs of other people; the command line calls `publish.export` and `variants.export`. This
package may import every other one; only the command line imports it.
"""

from ganserve_trainer.export.publish import export_module

__all__ = ["export_module"]
