"""A kernel of the tests that takes tensor maps, and the process that compiles it."""
