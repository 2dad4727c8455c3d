"""Measuring the product: parity, speed, cost, quality, and the pages that report them."""
