"""Precomputed features: extracting, storing and reading them."""
