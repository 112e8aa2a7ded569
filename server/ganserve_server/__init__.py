"""Serves images from a repository of GAN generators over gRPC."""

import os

# onnxruntime reports its use to its maker unless this stands in the environment before it is imported.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
