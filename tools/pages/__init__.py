"""Programs that write tables of pages in docs/."""
