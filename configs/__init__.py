"""Configuration: typed records and the TOML files that fill them."""
