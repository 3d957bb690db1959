"""Distances between two sets of features, and what one set says alone, in float64."""
