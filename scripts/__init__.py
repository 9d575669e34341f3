"""The commands that a person runs, beside those at the top level."""
