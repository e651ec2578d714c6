"""How fast the parts are, beside what a user would pick instead."""
