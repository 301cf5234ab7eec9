"""Learning rates, and which layers get them: schedule, layer groups, range test."""
