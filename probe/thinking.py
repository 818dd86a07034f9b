"""How a reasoner thinks: question, latents, answer, by cached forwards over padded batches.

Prompts are padded on the left, masked and counted, so that a problem's numbers do not depend on its
batch. CODI's own evaluation masks only the question: the latents of a shorter question look at its
padding, and GPT-2's positions shift. That is `padding="original"`, to reproduce it.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from probe.plans import Item
from probe.positions import Script
from probe.reasoners import Reasoner

Padding = Literal["masked", "original"]
Call = Callable[[Mapping[str, Any]], Any]


@dataclass(slots=True, eq=False)
class Tape:
    """What a batch has read so far.

    Attributes:
        reasoner: Who reads.
        real: (batch, read) bool, which columns are no padding.
        cache: The model's keys and values of them.
        padding: "masked", or "original".
    """

    reasoner: Reasoner
    real: Tensor
    cache: Any = None
    padding: Padding = "masked"

    def inputs(self, embeds: Tensor) -> dict[str, Any]:
        """What the model is given to read these (batch, new, width) behind what is read."""
        first, new = self.cache is None, embeds.shape[1]
        given = {"inputs_embeds": embeds, "past_key_values": self.cache, "use_cache": True}
        if bool(self.real.all()) or (self.padding == "original" and not first):
            return given
        given["attention_mask"] = self.real.long()
        if self.padding == "masked":
            given["position_ids"] = (self.real.long().cumsum(1) - 1).clamp_min(0)[:, -new:]
        return given

    def read(self, embeds: Tensor, call: Call | None = None) -> Any:
        """Read (batch, new, width), all of them tokens or latents, but for a question's padding.

        Args:
            embeds: What is read.
            call: Runs the model on inputs, where somebody looks on.

        Returns:
            The model's output, with hidden states, and logits of the last position alone.
        """
        if self.cache is not None:
            self.real = torch.cat([self.real, self.real.new_ones(embeds.shape[:2])], 1)
        more = {"output_hidden_states": True, "logits_to_keep": 1}
        output = (call or self.reasoner.model.tap.call)(self.inputs(embeds) | more)
        self.cache = output.past_key_values
        return output

    def next(self, embeds: Tensor, call: Call | None = None) -> Tensor:
        """Read, and give the embedding of the latent that follows: (batch, 1, width)."""
        output = self.read(embeds, call)
        return self.reasoner.following(output.hidden_states[-1][:, -1:])

    def fork(self) -> "Tape":
        """A tape that goes on from here by itself."""
        return Tape(self.reasoner, self.real, copy.deepcopy(self.cache), self.padding)


def ask(
    reasoner: Reasoner, items: Sequence[Item], padding: Padding = "masked"
) -> tuple[Tape, Tensor]:
    """Read the questions.

    Returns:
        The tape, and the embedding of the first latent, (batch, 1, width).
    """
    longest = max(item.length for item in items)
    ids = torch.zeros(len(items), longest, dtype=torch.long)
    real = torch.zeros(len(items), longest, dtype=torch.bool)
    for row, item in enumerate(items):
        ids[row, longest - item.length :] = torch.tensor(item.token_ids)
        real[row, longest - item.length :] = True
    device = reasoner.model.device
    tape = Tape(reasoner, real.to(device), padding=padding)
    return tape, tape.next(reasoner.embed(ids.to(device)))


def reason(tape: Tape, latent: Tensor) -> Tensor:
    """Read all latents, the first of which is given: (batch, n_latents, width)."""
    latents = []
    for _ in range(tape.reasoner.n_latents):
        latents.append(latent)
        latent = tape.next(latent)
    return torch.cat(latents, 1)


def close(tape: Tape) -> Tensor:
    """Read what closes: logits of the first token of the answer, (batch, vocabulary)."""
    closing = torch.tensor([tape.reasoner.closes], device=tape.real.device)
    output = tape.read(tape.reasoner.embed(closing).expand(len(tape.real), -1, -1))
    logits: Tensor = output.logits[:, -1]
    return logits


def answer(tape: Tape, logits: Tensor, most: int) -> list[list[int]]:
    """Decode greedily: the token ids of each answer, without the one that ends it.

    Args:
        tape: Read until the answer.
        logits: Of its first token, (batch, vocabulary).
        most: Tokens at most.
    """
    reasoner, said = tape.reasoner, []
    done = torch.zeros(len(logits), dtype=torch.bool, device=logits.device)
    for n in range(most):
        token = logits[:, : reasoner.words].argmax(-1)
        said.append(token)
        if reasoner.stop is not None:
            done |= token == reasoner.stop
        if n + 1 == most or bool(done.all()):
            break
        logits = tape.read(reasoner.embed(token[:, None])).logits[:, -1]
    rows = torch.stack(said, 1).tolist() if said else [[]] * len(logits)
    return [row[: row.index(reasoner.stop)] if reasoner.stop in row else row for row in rows]


def nll(tape: Tape, logits: Tensor, targets: Sequence[Sequence[int]]) -> list[float]:
    """How unlikely given answers are: minus the logarithm of their probability, in nats.

    Summed over an answer's tokens, in float32 or wider; NaN for an empty one.

    Args:
        tape: Read until the answer; it is left as it is.
        logits: Of its first token, (batch, vocabulary).
        targets: Token ids of each answer.
    """
    reasoner, longest = tape.reasoner, max(map(len, targets), default=0)
    if not longest:
        return [float("nan")] * len(targets)
    ids = torch.zeros(len(targets), longest, dtype=torch.long, device=logits.device)
    for row, target in zip(ids, targets, strict=True):
        row[: len(target)] = torch.tensor(target)
    rows = logits[:, None]
    if longest > 1:
        fork = tape.fork()
        fork.real = torch.cat([fork.real, fork.real.new_ones(len(ids), longest - 1)], 1)
        rest = reasoner.model.tap.call(fork.inputs(reasoner.embed(ids[:, :-1]))).logits
        rows = torch.cat([rows, rest], 1)
    wide = rows if rows.dtype == torch.float64 else rows.float()
    each = torch.nn.functional.cross_entropy(wide.transpose(1, 2), ids, reduction="none")
    return [
        float(one[: len(target)].double().sum()) if target else float("nan")
        for one, target in zip(each, targets, strict=True)
    ]


def script(reasoner: Reasoner, items: Sequence[Item], most: int) -> list[Script]:
    """What each sequence says in the end, so that interventions find what they name."""
    return [
        (
            [*item.token_ids, *[-1] * reasoner.n_latents, *reasoner.closes],
            (*item.segments, *later(reasoner, most)),
        )
        for item in items
    ]


def later(reasoner: Reasoner, answer: int) -> list[str]:
    """The segments of what follows a question."""
    counts = {"latent": reasoner.n_latents, "eot": len(reasoner.closes), "answer": answer}
    return [name for name, count in counts.items() for _ in range(count)]
