"""Recipes over captured attention, and experiments that change it; the modules are the API.

- `flow`: flow, hub and skip over a square block, as published and (`calibrated`) against chance.
- `heads`: statistics of each head (entropy, distance, sink, previous-token, induction, ...).
- `suppression`: scale, hide or steer what is looked at; dose-response; relevance of tokens.
- `ablation`: take heads out, one by one or together; gradient importance.
- `patching`: put another run's activations in place; path patching.
- `effects`: what any intervention changes in every prediction, beside its `controls`.
- `latent`: how latent reasoners look at their latents: scores beyond chance, knock-outs, readout.
- `compare`: models over the same problems, by relative depth, with paired tests.
- `stats`: bootstrap intervals and sign-flip tests over problems.
- `plots`: head maps, head grids, patterns, effects, doses, tokens.
- `demo`: a shipped model and its induction heads.
- `latent_study`: document 002's study in a folder; `latent_export` its files, `latent_data` its
  questions.
- `cli`: the command `probe`.
"""
