"""The archive: what lies in it, how its objects become rows with pixels, and a phantom one."""
