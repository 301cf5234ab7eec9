"""Image classifiers: making them, and where they can be entered."""
