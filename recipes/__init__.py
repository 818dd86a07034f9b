"""Recipes over captured attention; the modules are the API.

- `flow`: flow, hub and skip over a square block, as published and (`calibrated`) against chance.
- `heads`: statistics of each head (entropy, distance, sink, previous-token, induction, ...).
- `plots`: head maps, head grids, patterns.
- `demo`: a shipped model and its induction heads.
- `cli`: the command `probe`.
"""
