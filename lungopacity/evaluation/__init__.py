"""Metrics with intervals, the paper's table beside ours, figures, and the evaluation journey."""
