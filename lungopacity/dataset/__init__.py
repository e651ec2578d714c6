"""Labelled images: the labels file, splits, leak checks, and decoded pixels."""
