"""Serves images from a repository of GAN generators over gRPC."""
