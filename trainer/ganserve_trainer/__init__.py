"""Trains GAN image generators and exports each to one self-describing ONNX file."""
