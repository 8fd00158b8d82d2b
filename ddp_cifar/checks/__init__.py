"""What the preflight looks at: each rank's own machine, what ranks have in common, the network between them.

A check is a function of `Here` that returns what it measured, and raises `Problem` for what is wrong or `LeftOut` where it has
nothing to look at.
"""
