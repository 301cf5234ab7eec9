"""The means of the command line, which the recipes share."""
