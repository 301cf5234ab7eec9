"""Plug-ins for any `transformers.Trainer`."""
