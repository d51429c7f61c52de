"""Packing: from a data set as downloaded to WebDataset shards with a manifest."""
