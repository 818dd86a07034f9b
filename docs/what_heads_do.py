"""What heads and tokens do: ablate, suppress, and ask how sure one can be.

The cells (`# %%`) open as a notebook in most editors; `python docs/what_heads_do.py` runs them all.
"""
# ruff: noqa: T201

# %% Every head of a model that copies random tokens read twice, ablated on its own
import probe
from recipes import ablation, heads, plots, stats, suppression
from recipes.summaries import missed

model = probe.load("demo-llama", device="cpu")
problems = probe.problems("demo:repeated", n=32)
second = slice(22, None)  # tokens of the second copy, which can be predicted
costs = ablation.sweep(model, problems, tokens=second, progress=False)
found = stats.bootstrap(costs.delta_loss)
for row in heads.rank(costs.delta_loss, top=5):
    at = found.sel(layer=row.layer, head=row.head)
    print(f"{row.label}: {row.score:.3f} nats a token [{at.low:.3f}, {at.high:.3f}]")
figure = plots.effect_map(found, title="heads ablated, one by one").figure

# %% What gradients say of the same heads
local = ablation.importance(model, problems, tokens=second)
print(*missed(costs.delta_loss, local), sep="\n")

# %% The induction heads stand in for each other: together they are all that copies
induction = [(1, head) for head in range(4)]
for mode in ("zero", "mean"):
    gone = ablation.Ablate(induction, mode=mode)
    ds = ablation.effect(model, problems, gone, tokens=second, progress=False)
    after = float((ds.base_loss + ds.delta_loss).mean())
    right = float(ds.accuracy.mean())
    print(f"all four, {mode}: accuracy {right:.3f}, loss {after:.3f} (guessing one of 63: 4.143)")
    print(f"  controls: no-op {float(abs(ds.noop).max()):g}")

# %% An instruction, heard less and less
instructed = probe.load("demo-instruct", device="cpu")
copy = probe.demos.instructed("copy", n=10, count=64)  # a first token, "=", ten to copy, "|", ...
factors = [1, 0.5, 0.1, 0.01, 0]
doses = suppression.dose_response(
    instructed, copy, suppression.Suppress(keys=1), factors, tokens=slice(13, None), progress=False
)
for factor, right in zip(factors, doses.accuracy.mean("problem").values, strict=True):
    print(f"attention to the instruction times {factor}: accuracy {right:.3f}")
curve = plots.dose_response(factors, stats.bootstrap(doses.accuracy)).figure

# %% Which tokens an answer depends on
relevance = suppression.relevance(instructed, ["+abcd|"], max_new_tokens=4, progress=False)
print(f"answer {relevance.target.item()!r}")
for token, value in zip(relevance.token.values[0], relevance.relevance.values[0], strict=True):
    print(f"  {token!r}: {value:.2f} nats")
