"""Who is compared, each with what it is called and where it lives.

A module here needs nothing but what its contender needs; `WAYS` maps names to functions that make a
`Run` of a `Case`, or raise `UnsupportedError`.
"""

from typing import NamedTuple


class Contender(NamedTuple):
    """One line of the tables.

    Attributes:
        module: Of this package.
        way: In its `WAYS`.
        environment: The virtual environment that it runs in; "" is this one.
    """

    module: str
    way: str
    environment: str = ""


CONTENDERS = {
    "eager forward, nothing kept": Contender("huggingface", "eager"),
    "output_attentions=True": Contender("huggingface", "output_attentions"),
    "output_attentions=True, pickle": Contender("huggingface", "pickle"),
    "forward hooks": Contender("hooks", "hooks"),
    "nnsight .source": Contender("source", "source"),
    "TransformerLens run_with_cache": Contender("lens", "cache", "lens"),
    "nnterp": Contender("terp", "trace", "nnterp"),
    "probe, run_with_cache": Contender("ours", "cache"),
    "probe, capture": Contender("ours", "capture"),
}

# What each virtual environment holds besides torch; nnterp 1.3 does not import under nnsight 0.8.
ENVIRONMENTS = {
    "lens": ("transformer-lens==4.3.0", "transformers==5.23.0"),
    "nnterp": ("nnterp==1.3.0", "nnsight<0.8", "transformers==5.23.0"),
}
