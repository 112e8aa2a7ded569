"""Trains GAN image generators and exports each to one self-describing ONNX file."""

import os

# onnxruntime sends telemetry to its vendor unless this variable is set before the import.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
