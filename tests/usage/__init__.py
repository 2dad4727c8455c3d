"""The tool used as people use it: commands that are killed, that run side by side, and that are given damaged files.

`chaos` kills commands at random moments and mends what they left with the commands that the tool hints at. `pairs`
starts two commands at once on one bundle. The tests whose names begin with ``test_damaged`` give damaged files to
commands. ``make usage`` runs all of it.
"""
