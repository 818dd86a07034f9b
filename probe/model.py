"""A tapped model: run it, look into it, change it."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import torch
from nnsight.intervention.envoy import Envoy
from torch import Tensor, nn
from transformers import PreTrainedModel

from probe import selection
from probe.cache import Cache
from probe.errors import InputError
from probe.fingerprint import fingerprint
from probe.hooks import HookFunction, Name, resolve
from probe.hooks import hooks as make_hooks
from probe.interventions import SITES, Intervention, Site, lasting, require
from probe.layout import Layout
from probe.loss import ReturnType, returned
from probe.recording import cached, record
from probe.selection import Selector
from probe.tap import Tap
from probe.text import Inputs, Text


class Model:
    """A tapped model. Use it as a context manager, or `close` it, to get the model back unchanged.

    Attributes:
        module: The model.
        name: What it was loaded as.
        tap: Where its attention is read.
        text: How texts and token ids become batches.
    """

    def __init__(
        self,
        module: nn.Module,
        tokenizer: Any = None,
        *,
        name: str | None = None,
        layout: Layout | None = None,
    ):
        self.module = module
        self.tap = Tap(module, layout)
        name = name or getattr(self.config, "_name_or_path", None) or type(self.base).__name__
        # A store's record names a model in a local folder by the folder, not by the machine's path.
        self.name = Path(name).resolve().name if Path(name).is_dir() else name
        self.tokenizer = tokenizer

    @property
    def base(self) -> nn.Module:
        """The transformers model, inside all wrappers; else the module itself."""
        return self.tap.intake.base

    @property
    def config(self) -> Any:
        """Its config, or None."""
        return getattr(self.base, "config", None)

    @property
    def tokenizer(self) -> Any:
        """Its tokenizer, or None; set it to use another."""
        return self.text.tokenizer

    @tokenizer.setter
    def tokenizer(self, tokenizer: Any) -> None:
        self.text = Text(tokenizer, self.name, self.tap.intake)
        self.tap.watch.ruler.text = self.text

    def batch(self, inputs: Inputs) -> dict[str, Tensor]:
        """Inputs as the model takes them: see `probe.text.Text.batch`."""
        return self.text.batch(inputs)

    @property
    def envoy(self) -> Envoy:
        """The root envoy: `with model.envoy.trace(...)`; attention envoys in it have `.pattern`."""
        return self.tap.envoy

    @property
    def layers(self) -> tuple[int, ...]:
        """Absolute indices of the layers that have attention."""
        return tuple(self.tap.layers)

    @property
    def n_layers(self) -> int:
        """Layers, those without attention included."""
        return max(self.layers) + 1

    @property
    def n_heads(self) -> int:
        """Query heads in a layer; where layers differ, the most (see `tap.shapes`)."""
        return max(shape.heads for shape in self.tap.shapes.values())

    @property
    def n_kv_heads(self) -> int:
        """Key heads in a layer; where layers differ, the most."""
        return max(shape.kv_heads for shape in self.tap.shapes.values())

    @property
    def context(self) -> int | None:
        """Longest input in tokens, or None where the model states no limit."""
        return self.tap.intake.context

    @property
    def vocabulary(self) -> int:
        """Rows of the embedding: token ids are below it."""
        return self.tap.intake.vocabulary

    @property
    def device(self) -> torch.device:
        """Where inputs go."""
        return self.tap.intake.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return self.tap.intake.dtype

    def __call__(self, inputs: Inputs, **kwargs: Any) -> Any:
        """Run the model on text, texts, token ids, or what a tokenizer returns.

        Returns:
            What the model returns.
        """
        with self.tap.watch.lock:
            return self.tap.call(self.batch(inputs) | kwargs)

    @contextmanager
    def intervene(self, *interventions: Intervention) -> Iterator["Model"]:
        """Change attention in every forward of this model inside the `with` block.

        That is `model(...)`, `model.generate(...)`, `probe.capture`, traces of `model.envoy`, a
        training step. Contexts may be nested: the outer interventions act first. Other threads
        that use this model wait.

        Args:
            interventions: `probe.Bias`, `probe.Edit`, those of the recipes, or any object with
                `edits(call)`: see `probe.interventions`, also for the order in which they act.

        Raises:
            InputError: Something is not an intervention.

        Example:
            >>> with model.intervene(probe.Bias(value=-1.0, keys="last:2")):
            ...     text = model.generate("abc", max_new_tokens=2)
        """
        for one in interventions:
            require(one)
        self.tap.check()
        with self.tap.watch.on(*interventions):
            yield self

    @contextmanager
    def hooks(
        self,
        fwd_hooks: Iterable[tuple[Name, HookFunction]] = (),
        bwd_hooks: Iterable[tuple[Name, HookFunction]] = (),
    ) -> Iterator["Model"]:
        """Put functions on attention inside the `with` block, as TransformerLens does.

        Args:
            fwd_hooks: Pairs (name, function): `function(tensor, hook)` returns a new tensor, or
                None for the tensor itself, changed in place or only looked at. An argument
                called `hook` is given by that name. Names, tuples, regular expressions and filters:
                see `probe.hooks.resolve`; shapes: see `probe.interventions.Change`. A hook on
                scores or pattern computes them in full in its layer; the model leaves its own
                kernel there only if they are changed.
            bwd_hooks: Likewise for gradients; a returned tensor replaces the gradient. A site
                with a backward hook is computed on the model's path.

        Under gradient checkpointing (not reentrant) `backward()` belongs inside the block too: each
        layer runs a second time there, and its hooks are called a second time.

        Raises:
            InputError: A name names nothing, or a function returns something else than a tensor of
                the same shape.
            WiringError: A layer runs again for its gradients without its hooks.

        Example:
            >>> def first_head_off(pattern, hook):
            ...     pattern[:, 0] = 0
            >>> with model.hooks([("blocks.1.attn.hook_pattern", first_head_off)]):
            ...     logits = model("abcabc").logits
        """
        with self.intervene(make_hooks(fwd_hooks, bwd_hooks, self.layers)):
            yield self

    def run_with_hooks(
        self,
        inputs: Inputs,
        fwd_hooks: Iterable[tuple[Name, HookFunction]] = (),
        bwd_hooks: Iterable[tuple[Name, HookFunction]] = (),
        return_type: ReturnType = "logits",
    ) -> Any:
        """One forward under hooks: see `hooks`.

        Args:
            inputs: As for `batch`.
            fwd_hooks: Pairs (name, function).
            bwd_hooks: Likewise; they are called when you call `backward`.
            return_type: "logits" (batch, position, vocabulary); "loss", the mean next-token loss
                over all tokens in nats, padding left out (NaN where no token has a next one);
                "both"; or None.

        Example:
            >>> model.run_with_hooks("abc", [(("z", 0), lambda z, hook: 0 * z)]).shape
            torch.Size([1, 4, 64])
        """
        with self.hooks(fwd_hooks, bwd_hooks):
            batch = self.batch(inputs)
            return returned(
                self.tap.call(batch), batch, return_type, who=type(self.module).__name__
            )

    def run_with_cache(
        self,
        inputs: Inputs,
        sites: Site | Sequence[Site] = ("pattern", "scores", "z"),
        *,
        layers: Selector = None,
        heads: Selector = None,
        queries: Selector = None,
        keys: Selector = None,
        names_filter: Name | None = None,
        return_type: ReturnType = "logits",
    ) -> tuple[Any, Cache]:
        """One forward that keeps activations; the model stays on its own kernel.

        Only what is asked is computed. Inside `hooks` and `intervene` it shows the changed values.

        Args:
            inputs: As for `batch`.
            sites: Of "pattern", "scores", "z", "q", "k", "v".
            layers: int, negative int, slice or list; default all.
            heads: Query heads, likewise.
            queries: Rows by token position, likewise, or "last:6", "first:6", "segment:bos";
                default all, padding included.
            keys: Columns, likewise.
            names_filter: Instead of sites and layers: a name, a regular expression, ...: see
                `probe.hooks.resolve`.
            return_type: As for `run_with_hooks`.

        Returns:
            (logits, cache): see `probe.cache.Cache`. Gradients flow from the cache to the model;
            those of the loss with respect to what is kept are heard by `bwd_hooks`.

        Raises:
            InputError: Something cannot be selected.

        Example:
            >>> logits, cache = model.run_with_cache("abcabc", layers=-1, queries="last:1")
            >>> cache["pattern", -1].shape
            torch.Size([1, 4, 1, 7])
        """
        if names_filter is not None:
            places = resolve(names_filter, self.layers)
        else:
            if not isinstance(sites, Iterable):
                raise InputError(f"sites={sites!r:.60}. Choose from {', '.join(SITES)}.")
            chosen, layers = (sites,) if isinstance(sites, str) else tuple(sites), lasting(layers)
            places = [p for site in chosen for p in resolve((site, layers), self.layers)]
        if not places:
            raise InputError("sites=() keeps nothing. Name at least one, as sites='pattern'.")
        fewest = min(self.tap.shapes[layer].heads for _, layer in places)
        absolute = selection.axis(heads, fewest, "heads")
        self.tap.check()
        batch = self.batch(inputs)
        if "input_ids" not in batch:
            raise InputError(
                "run_with_cache labels what it keeps by token ids, and these inputs have none. "
                "Give token ids, or read them with hooks."
            )
        found = record(
            self.tap,
            batch,
            places,
            heads=None if heads is None else absolute,
            queries=queries,
            keys=keys,
            text=self.text,
        )
        cache = cached(
            found,
            batch["input_ids"],
            self.text,
            layers=self.layers,
            heads=absolute,
            causal=self.tap.causal,
        )
        who = type(self.module).__name__
        return returned(found.output, batch, return_type, who=who), cache

    def generate(self, inputs: Inputs, **kwargs: Any) -> Any:
        """The model's own `generate`, on text, texts, token ids or what a tokenizer returns.

        Under `intervene` and `hooks` each step is changed, at the token positions of the whole
        sequence. Batches are padded on the left.

        Args:
            inputs: As for `batch`.
            kwargs: As for transformers, as `max_new_tokens=20, do_sample=False`.

        Returns:
            Token ids (batch, position), the prompt included, or what `return_dict_in_generate`
            asks for.

        Example:
            >>> model.generate("abc", max_new_tokens=2, do_sample=False).shape
            torch.Size([1, 6])
        """
        generate: Any = getattr(self.module, "generate", None)
        if generate is None or not isinstance(self.base, PreTrainedModel):
            raise InputError(
                f"{type(self.module).__name__} has no method generate, or one of its own. Call the "
                "model step by step, or model.module.generate, inside model.intervene(...)."
            )
        batch = self.text.batch(inputs, side="left")
        mask = batch.get("attention_mask")
        if mask is not None and mask.ndim == 2 and not bool(mask[:, -1].all()):
            raise InputError(
                "these inputs are padded on the right, behind which nothing can be generated. Set "
                "tokenizer.padding_side = 'left', or give texts or lists of token ids."
            )
        if not isinstance(inputs, Mapping):
            batch.pop("position_ids", None)  # generate counts them itself
        # Read in pieces or without a cache, what is generated could not be told from the prompt.
        prompt = mask.sum(1) if mask is not None and mask.ndim == 2 else None
        with self.tap.watch.on(prompt=prompt):
            return generate(**{"pad_token_id": self.text.padding} | batch | kwargs)

    def fingerprint(self) -> str:
        """A hash that tells checkpoints apart: see `probe.fingerprint`."""
        return fingerprint(self.base, self.module)

    def close(self) -> None:
        """Give the module back as it was."""
        self.tap.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return (
            f"Model({self.name!r}, {type(self.base).__name__}, {self.n_layers} layers x "
            f"{self.n_heads} heads, {self.n_kv_heads} key heads, {self.tap.implementation})"
        )
