"""The machine as a process sees it: how much memory and disk there is, and how libraries say that something failed."""
