"""What a run may say: typed records (`schema`) and the TOML files that fill them."""
