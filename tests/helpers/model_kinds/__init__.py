"""Kinds of models at tiny size, written as people write them.

Each function makes a `Kind`: parameters, arguments, a loss function, and what that
registers once more, for oracles. All is in double precision, with promotion as users
have it.
"""
