"""Queues images for each model version and runs them in batches, fairly and within deadlines.

Knows neither requests nor protocols: it takes draws and returns pixels. May not import the repository, services or
transport.
"""
