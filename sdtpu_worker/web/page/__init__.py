"""The page on which people make pictures in a browser: its files, and the endpoints that serve them.

The page is a client of the jobs API like any other. It has no build step: `files/` has what browsers get.
"""
