"""The machine as a process sees it: how much memory and disk there is, how libraries say that something failed,
and whether another process does the same."""
