"""The tool used as people use it: in processes of its own, killed at any moment, and two at a time.

`chaos` kills commands at random moments and mends what they left with the commands that the tool hints at. `pairs`
starts every two commands at once on one bundle. ``make usage`` runs both, and the tests of this folder.
"""
