"""Moments of rows in Gluon, for products whose kernels are in Gluon; see `row_moments`."""
