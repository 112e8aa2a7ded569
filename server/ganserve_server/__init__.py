"""Serves images from a repository of GAN generators over gRPC."""

import os

# onnxruntime sends telemetry to its vendor unless this variable is set before the import.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
