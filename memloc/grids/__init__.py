"""Scripted ablations: a grid of models, measures and ablations, run cell by cell, as one tidy table."""
