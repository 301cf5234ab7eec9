"""Sharing: the card, the recipe file, the push, the Space."""
