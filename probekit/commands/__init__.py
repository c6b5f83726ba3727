"""One file for each command: what can be typed behind it, and what is done with that.

Each has a function `command`, whose docstring is its help. It imports what it needs when it is called, since
all are imported to list them.
"""
