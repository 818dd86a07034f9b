"""Load a model, give it inputs: `load` and the `Model` that it returns."""

import inspect
import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from nnsight.intervention.envoy import Envoy
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from probe import demos, selection
from probe.cache import Cache, Recorded, record
from probe.errors import InputError, UnsupportedModelError
from probe.fingerprint import fingerprint
from probe.hooks import HookFunction, Name, resolve
from probe.hooks import hooks as make_hooks
from probe.interventions import Intervention, Site, require
from probe.layout import Layout
from probe.loss import logits_of, next_token_nll
from probe.schema import Labels
from probe.selection import Selector
from probe.tap import Tap

ReturnType = Literal["logits", "loss", "both"] | None
Inputs = str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]] | Tensor | Mapping[str, Any]


def load(
    source: str | Path | nn.Module,
    tokenizer: Any = None,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str | None = None,
    attn_implementation: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    layout: Layout | None = None,
) -> "Model":
    """Load a causal language model and tap its attention.

    The model stays on its own kernel. On loading, a forward of a few tokens finds the attention,
    and proves that what is read of every layer is what the model computes.

    Args:
        source: A name on the Hugging Face hub, a local folder, a shipped demonstration model
            (`demo-llama`, ...), a transformers model (perhaps wrapped by peft) or any module that
            reads token ids, used in place.
        tokenizer: Its tokenizer; by default the one stored beside the model. A model given as a
            module needs none when it is fed token ids.
        device: Where to put a model that is loaded by name; default a GPU if there is one.
        dtype: dtype of a model that is loaded by name; default the checkpoint's.
        attn_implementation: "sdpa", "eager", ...; default the fastest that transformers chooses.
        revision: Commit, tag or branch on the hub.
        trust_remote_code: Run code that a checkpoint brings along.
        layout: Where a module of your own has its attention, if it is not found by itself.

    Raises:
        InputError: The source cannot be found.
        UnsupportedModelError: The model type is unknown, or its attention cannot be reached.
        WiringError: What is read is not what the model computes.

    Example:
        >>> model = probe.load("demo-llama")
        >>> model.n_layers, model.n_heads, model.n_kv_heads
        (2, 4, 4)
    """
    if isinstance(source, nn.Module):
        return Model(source, tokenizer, layout=layout)
    name = str(source)
    shipped = name.startswith("demo-") and not Path(name).exists()
    place = demos.path(name) if shipped else source
    options = {"revision": revision, "trust_remote_code": trust_remote_code}
    try:
        module = AutoModelForCausalLM.from_pretrained(
            place, dtype=dtype or "auto", attn_implementation=attn_implementation, **options
        )
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        raise _unloadable(name, error) from error
    if tokenizer is None:
        try:
            tokenizer = AutoTokenizer.from_pretrained(place, **options)
        except (OSError, ValueError, ImportError) as error:
            raise InputError(
                f"{name!r} has no tokenizer that can be loaded ({_first_line(error)}). "
                "Give one with tokenizer=, or load the model yourself and give probe.load that."
            ) from error
    target = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return Model(nn.Module.to(module, target), tokenizer, name=name, layout=layout)


class Model:
    """A tapped model. Use it as a context manager, or `close` it, to get the model back unchanged.

    Attributes:
        module: The model.
        tokenizer: Its tokenizer, or None.
        name: What it was loaded as.
        tap: Where its attention is read.
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
        self.tokenizer = tokenizer
        self.tap = Tap(module, layout)
        name = name or getattr(self.config, "_name_or_path", None) or type(self.base).__name__
        # A store's record names a model in a local folder by the folder, not by the machine's path.
        self.name = Path(name).resolve().name if Path(name).is_dir() else name
        self._text: dict[int, str] = {}  # what each token says, once it was asked

    @property
    def base(self) -> nn.Module:
        """The transformers model, inside all wrappers; else the module itself."""
        return self.tap.intake.base

    @property
    def config(self) -> Any:
        """Its config, or None."""
        return getattr(self.base, "config", None)

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
                None for the tensor itself, changed in place or only looked at. Names, tuples,
                regular expressions and filters: see `probe.hooks.resolve`; shapes: see
                `probe.interventions.Change`. A hook on scores or pattern computes them in full in
                its layer; the model leaves its own kernel there only if they are changed.
            bwd_hooks: Likewise for gradients; a returned tensor replaces the gradient. A site
                with a backward hook is computed on the model's path.

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
                over all tokens in nats, padding left out; "both"; or None.

        Example:
            >>> model.run_with_hooks("abc", [(("z", 0), lambda z, hook: 0 * z)]).shape
            torch.Size([1, 4, 64])
        """
        with self.hooks(fwd_hooks, bwd_hooks):
            batch = self.batch(inputs)
            return self._returned(self.tap.call(batch), batch, return_type)

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
            queries: Rows by token position, likewise, or "last:6"; default all, padding included.
            keys: Columns, likewise.
            names_filter: Instead of sites and layers: a name, a regular expression, ...: see
                `probe.hooks.resolve`.
            return_type: As for `run_with_hooks`.

        Returns:
            (logits, cache): see `probe.cache.Cache`. Gradients flow from the cache to the model.

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
            chosen = (sites,) if isinstance(sites, str) else tuple(sites)
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
        )
        output = self._returned(found.output, batch, return_type)
        return output, self._cache(found, batch, absolute)

    def _cache(self, found: Recorded, batch: Mapping[str, Any], heads: Sequence[int]) -> Cache:
        real = [[c for c, p in enumerate(each) if p >= 0] for each in found.positions]
        rows, columns = found.queries or real, found.keys or real
        labels = []
        for item, positions in enumerate(found.positions):
            ids = [int(batch["input_ids"][item, c]) for c in columns[item]]
            segments = self.segments([int(batch["input_ids"][item, c]) for c in real[item]])
            labels.append(
                Labels(
                    id=str(item),
                    length=len(real[item]),
                    query_position=[positions[c] for c in rows[item]],
                    key_position=[positions[c] for c in columns[item]],
                    token=self.decode(ids),
                    token_id=ids,
                    segment=[segments[positions[c]] for c in columns[item]],
                )
            )
        chosen = found.queries, found.keys
        rows, columns = (
            side if some is None else [range(len(own)) for own in some]
            for side, some in zip((real, real), chosen, strict=True)
        )
        attrs = {"model": self.name, "causal": self.tap.causal}
        return Cache(found.tensors, self.layers, heads, labels, rows, columns, attrs)

    def _returned(self, output: Any, batch: Mapping[str, Any], return_type: ReturnType) -> Any:
        """What a forward is asked to return."""
        if return_type is None:
            return None
        if return_type not in ("logits", "loss", "both"):
            raise InputError(f"return_type={return_type!r}. Choose logits, loss, both or None.")
        logits = logits_of(output)
        if logits is None:
            raise InputError(
                f"{type(self.module).__name__} returned a {type(output).__name__} without logits "
                "(batch, position, vocabulary). Use return_type=None, or call the model itself."
            )
        if return_type == "logits":
            return logits
        ids = batch["input_ids"]
        real = batch.get("attention_mask", torch.ones_like(ids)).bool()
        if real.ndim != 2:
            raise InputError(
                f"a loss leaves padding out, which a mask of shape {tuple(real.shape)} does not "
                "tell from text. Give a mask (batch, position), or use return_type='logits'."
            )
        each = [next_token_nll(x[r], i[r]) for x, i, r in zip(logits, ids, real, strict=True)]
        loss = torch.cat(each).mean()
        return loss if return_type == "loss" else (logits, loss)

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
        batch = self.batch(inputs, side="left")
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
            return generate(**{"pad_token_id": self.padding} | batch | kwargs)

    @property
    def stop_tokens(self) -> frozenset[int]:
        """Token ids that end what is generated."""
        config = getattr(self.base, "generation_config", None) or self.config
        stop = getattr(config, "eos_token_id", None)
        return frozenset([stop] if isinstance(stop, int) else stop or ())

    def segments(self, token_ids: Sequence[int]) -> tuple[str, ...]:
        """What each token of a problem is: "bos" for a first token that is one, else "text"."""
        bos = getattr(self.tokenizer, "bos_token_id", None)
        first = "bos" if bos is not None and token_ids[0] == bos else "text"
        return (first, *["text"] * (len(token_ids) - 1))

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, with the special tokens that the tokenizer adds."""
        if self.tokenizer is None:
            raise InputError(
                f"{self.name} was loaded without a tokenizer, so it cannot read the text "
                f"{text[:40]!r}. Give token ids, or load it with tokenizer=."
            )
        try:
            return [int(i) for i in self.tokenizer(text)["input_ids"]]
        except Exception as error:
            raise InputError(
                f"the tokenizer of {self.name} cannot encode {text[:40]!r}: "
                f"{_first_line(error)}. Change the text, or give token ids."
            ) from error

    def decode(self, token_ids: Sequence[int]) -> list[str]:
        """Each token as text, the space before a word included; "" without a tokenizer."""
        if self.tokenizer is None:
            return [""] * len(token_ids)
        self._text |= {i: self._decode_one(i) for i in set(token_ids) - self._text.keys()}
        return [self._text[i] for i in token_ids]

    def _decode_one(self, token: int) -> str:
        # Alone, a token may lose its leading space; after itself it keeps it.
        once = self.tokenizer.decode([token])
        twice = self.tokenizer.decode([token, token])
        return str(twice[len(once) :] if twice.startswith(once) else once)

    def batch(self, inputs: Inputs, *, side: str | None = None) -> dict[str, Tensor]:
        """Inputs as the model takes them: padded, masked, and with positions where padding shifts.

        Args:
            inputs: A text, texts, token ids (one list or several), a tensor of them, or the dict
                that a tokenizer returns (used as it is; on the left, padding also needs
                position_ids, which are added where the model takes them).
            side: "left" or "right", where to pad; default the tokenizer's.

        Returns:
            input_ids (batch, position), attention_mask of the same shape, perhaps position_ids.
        """
        if isinstance(inputs, Mapping):
            return self._positioned(self._tensors(inputs))
        if isinstance(inputs, Tensor):
            inputs = inputs.tolist()
        if isinstance(inputs, str):
            inputs = [inputs]
        try:
            rows: list[Any] = list(inputs)
            if rows and isinstance(rows[0], int | np.integer):
                rows = [rows]
            ids = [
                self.encode(row) if isinstance(row, str) else [operator.index(i) for i in row]
                for row in rows
            ]
        except TypeError as error:
            raise InputError(
                f"input {inputs!r:.60} is neither text nor token ids ({error}). Give a text, "
                "texts, a list of token ids, lists of them, or what a tokenizer returns."
            ) from error
        if not ids or not all(ids):
            raise InputError(f"input {inputs!r:.60} holds no tokens. Give at least one.")
        for row in ids:
            self.check(row)
        side = side or self.padding_side
        return self._positioned(pad(ids, self.padding, side=side, device=self.device))

    def _tensors(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """What a tokenizer returns, with or without return_tensors, on the model's device."""
        batch = dict(inputs)
        ids = batch.get("input_ids")
        if ids is not None and not isinstance(ids, Tensor):
            rows = [ids] if isinstance(ids[0], int) else ids
            if len({len(row) for row in rows}) > 1:  # not padded: its masks are all ones
                batch |= pad(rows, self.padding, side=self.padding_side)
            else:
                batch = {k: torch.as_tensor(v).view(len(rows), -1) for k, v in batch.items()}
        for row in batch["input_ids"].tolist() if "input_ids" in batch else []:
            self.check(row)
        return {k: v.to(self.device) if isinstance(v, Tensor) else v for k, v in batch.items()}

    @property
    def padding(self) -> int:
        """A token id to pad with; what it is never matters, padding is masked."""
        token = getattr(self.tokenizer, "pad_token_id", None)
        return int(token) if token is not None else 0

    @property
    def padding_side(self) -> str:
        """The tokenizer's side, "right" without one."""
        return str(getattr(self.tokenizer, "padding_side", "right"))

    def check(self, token_ids: Sequence[int], *, what: str = "the input") -> None:
        """Refuse token ids that the model cannot run on.

        Raises:
            InputError: Too long for the context, or outside the vocabulary.
        """
        if self.context is not None and len(token_ids) > self.context:
            raise InputError(
                f"{what} has {len(token_ids)} tokens, and the context of {self.name} is "
                f"{self.context}. Shorten it, or cut it with max_length={self.context}."
            )
        size = self.vocabulary
        wrong = next((i for i in token_ids if not 0 <= i < size), None)
        if wrong is not None:
            raise InputError(
                f"{what} holds token id {wrong}, and the vocabulary of {self.name} has "
                f"{size} (0 to {size - 1}). Encode it with its own tokenizer."
            )

    def _positioned(self, batch: dict[str, Any]) -> dict[str, Any]:
        mask = batch.get("attention_mask")
        if mask is None or "position_ids" in batch or mask.ndim != 2 or bool(mask[:, 0].all()):
            return batch
        if "position_ids" in inspect.signature(type(self.base).forward).parameters:
            batch["position_ids"] = (mask.long().cumsum(-1) - 1).clamp_min(0)
        return batch

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


def pad(
    rows: Sequence[Sequence[int]],
    token: int,
    *,
    side: str = "right",
    device: torch.device | None = None,
) -> dict[str, Tensor]:
    """Token ids of different lengths as one batch.

    Returns:
        input_ids and attention_mask (1 = token), int64, (batch, longest).
    """
    longest = max(len(row) for row in rows)
    ids = torch.full((len(rows), longest), token)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        where = slice(longest - len(row), None) if side == "left" else slice(len(row))
        ids[i, where] = torch.as_tensor(row)
        mask[i, where] = 1
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


def _unloadable(name: str, error: Exception) -> InputError | UnsupportedModelError:
    reason = _first_line(error)
    if isinstance(error, ValueError) and ("model type" in str(error) or "Unrecognized" in reason):
        return UnsupportedModelError(
            f"{name!r} is not a causal language model that this transformers knows: {reason} "
            "Upgrade transformers, or load it yourself and give probe.load the module."
        )
    return InputError(
        f"{name!r} cannot be loaded: {reason} Give a name on the hub, a local folder, or one of "
        f"{', '.join(demos.NAMES)}."
    )


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), repr(error))
