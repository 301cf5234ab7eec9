"""The Trainer and its recipes."""
