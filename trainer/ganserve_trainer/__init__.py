"""Trains GAN image generators and exports each to one self-describing ONNX file."""

import os

# onnxruntime reports its use to its maker unless this stands in the environment before it is imported.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
