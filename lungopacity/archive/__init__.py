"""The archive: lists its objects, reads them into rows with pixels, and makes a phantom archive."""
