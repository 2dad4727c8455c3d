"""Moments of rows in pieces of 128 columns, from which norms over whole rows follow."""
