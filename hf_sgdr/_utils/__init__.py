"""What stands on nothing of ours: files and stores, text, plots, the machine."""
