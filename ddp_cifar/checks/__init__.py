"""The checks of the preflight: each rank's machine, everything that ranks share, and the network between them.

A check is a function of a `RankContext`. It returns its measurement as text, raises `Problem` if something is wrong, or raises
`Skipped` if it does not apply.
"""
