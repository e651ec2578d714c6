"""The output of screening: its schemas, the results folder with its commit records, and SQL."""
