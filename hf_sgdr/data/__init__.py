"""From a file to pixels: folders, data sets of the Hub, splits, transforms, caches."""
