"""Measure models on labelled films: metrics with intervals, reports, comparisons and audits."""
