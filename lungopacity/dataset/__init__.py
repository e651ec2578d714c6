"""Labelled images: the manifest, its splits and leak checks, and the decoded pixels."""
