"""Find induction heads, knock them out, watch the loss: with hooks only.

The cells (`# %%`) open as a notebook in most editors; `python docs/induction_heads.py` runs them
all. Names, shapes and hook functions are those of TransformerLens' main demonstration.
"""
# ruff: noqa: T201

# %% A model that ships with the package, and random tokens read twice
import torch

import probe
from probe.hooks import Hook

model = probe.load("demo-llama", device="cpu")
n = 20
tokens = torch.tensor(probe.demos.repeated(n, count=64))  # a first token, then n tokens, twice
print(f"{model}\n{tuple(tokens.shape)} tokens")

# %% Every pattern, looked at in one forward: how much a token looks behind its earlier copy
scores = torch.zeros(model.n_layers, model.n_heads)


def score(pattern: torch.Tensor, hook: Hook) -> None:
    """Mean attention of the second copy to the token after the first: n - 1 tokens back."""
    stripe = pattern.diagonal(offset=1 - n, dim1=-2, dim2=-1)[..., 2:]  # queries in the second copy
    scores[hook.layer()] = stripe.mean((0, -1))


with torch.no_grad():
    model.run_with_hooks(
        tokens, fwd_hooks=[(lambda name: name.endswith("pattern"), score)], return_type=None
    )
for layer, row in enumerate(scores.tolist()):
    print(f"layer {layer}:", "  ".join(f"{x:.2f}" for x in row))
induction = [(layer, head) for layer, head in (scores > 0.5).nonzero().tolist()]
print("induction heads:", ", ".join(f"L{layer}H{head}" for layer, head in induction))


# %% Knock heads out, and watch the loss of the second copy
def loss(heads: list[tuple[int, int]]) -> float:
    """Mean next-token loss of the second copy in nats, with the z of some heads set to 0."""

    def ablate(z: torch.Tensor, hook: Hook) -> torch.Tensor:
        z[:, :, [head for layer, head in heads if layer == hook.layer()]] = 0
        return z

    layers = sorted({layer for layer, _ in heads})
    with torch.no_grad():
        hooks = [(f"blocks.{layer}.attn.hook_z", ablate) for layer in layers]
        logits = model.run_with_hooks(tokens, fwd_hooks=hooks)
    picked = logits[:, n + 1 : -1].log_softmax(-1).gather(-1, tokens[:, n + 2 :, None])
    return -float(picked.mean())


print(f"nobody:               {loss([]):.3f} nats")
for one in induction:
    print(f"only L{one[0]}H{one[1]}:            {loss([one]):.3f}")
print(f"all induction heads:  {loss(induction):.3f}  (guessing: {torch.tensor(63.0).log():.3f})")
print(f"the previous-token head L0H3, which feeds them: {loss([(0, 3)]):.3f}")


# %% The same knock-out, on the edges: nobody may look behind an earlier copy
def blind(pattern: torch.Tensor, hook: Hook) -> None:
    """Zero what lies n - 1 tokens back, in place."""
    pattern.diagonal(offset=1 - n, dim1=-2, dim2=-1).zero_()


with torch.no_grad():
    seen = model.run_with_hooks(tokens, return_type="loss")
    unseen = model.run_with_hooks(tokens, fwd_hooks=[(("pattern", 1), blind)], return_type="loss")
print(f"loss of all tokens: {seen:.3f}, without the induction edges {unseen:.3f}")
