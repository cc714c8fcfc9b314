"""Models whose towers are not CLIP's own (SigLIP, EVA, CoCa …), built by their project's package and evaluated only.

The weights are read by us, and nothing in them, their configuration or their tokenizer is executed.
"""

import hashlib
import importlib
import importlib.util
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from declip_cli.data.tokenizer import Tokenizer
from declip_cli.errors import ModelError
from declip_cli.interop.foreign import DAMAGED
from declip_cli.model.clip import Encoder
from declip_cli.model.preprocessing import Preprocessing

_INSTALL = "pip install 'declip[openclip,huggingface]'"
MAX_CONTEXT_LENGTH = 1024
_LEAST_BOUND = 1024
"""A configuration's numbers may be as large as this whatever the weights: sides of images, head widths."""
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
_TOKENIZER_OPTIONS = ("clean", "strip_sep_token")
"""Of OpenCLIP's `tokenizer_kwargs`, those that its own configurations have."""
_TOKENIZER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)?")


@dataclass(frozen=True, slots=True, kw_only=True)
class OtherTowers:
    """All that is known about such a model, without a module."""

    project: str
    """`open_clip` or `huggingface`."""
    reason: str
    """Why our towers cannot be these."""
    make: Callable[[Mapping[str, Tensor]], Encoder]
    """Makes the module and gives it its weights, whatever it raises."""
    state: dict[str, Tensor]
    """Under the project's names; on the device `meta` where only shapes were read."""
    config: Mapping[str, Any]
    """Of the towers, as the project writes it."""
    embed_dim: Any
    """As the configuration has it."""
    preprocessing: Preprocessing
    context_length: int
    tokenizer_name: str = ""
    """On the Hub; empty for CLIP's vocabulary."""
    tokenizer_options: Mapping[str, Any] | None = None
    """OpenCLIP's `tokenizer_kwargs`; None leaves texts as they are."""
    container: str
    paths: tuple[Path, ...]
    facts: dict[str, Any] = field(default_factory=dict)
    assumed: tuple[str, ...] = ()
    method: str = "clip"
    is_token_wise: bool = False

    def describe(self) -> dict[str, Any]:
        """Write all but the weights as plain values, which two different models never share."""
        files = [self.paths[0].parent / name for name in _TOKENIZER_FILES]
        digests = [hashlib.sha256(path.read_bytes()).hexdigest() for path in files if path.is_file()]
        return {"config": dict(self.config), "tokenizer": digests}

    def build(self) -> Encoder:
        """Make the encoder, in evaluation mode.

        Raises:
            ModelError: a package is missing or cannot build it, or the weights do not fit.
        """
        _check_numbers(self.config, self.state)
        try:
            with torch.random.fork_rng(devices=[]):
                encoder = self.make({n: v.float() if v.is_floating_point() else v for n, v in self.state.items()})
        except (
            TypeError,
            ValueError,
            KeyError,
            RuntimeError,
            AttributeError,
            AssertionError,
            ArithmeticError,
        ) as error:
            reason = " ".join(str(error).split())
            raise ModelError(f"the model of {self.paths[0]} cannot be built: {reason:.300}", remedy=DAMAGED) from error
        encoder.set_pixels(self.preprocessing.mean, self.preprocessing.std)
        return encoder.eval()

    def tokenizer(self) -> "OtherTokenizer":
        """Return its tokenizer, whose files are read when it is first used."""
        return OtherTokenizer(
            context_length=self.context_length,
            name=self.tokenizer_name,
            options=self.tokenizer_options,
            folder=self.paths[0].parent,
        )


def _check_numbers(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> None:
    """Refuse sizes that the weights have not, before memory is taken for them."""
    bound = max([_LEAST_BOUND, len(state), *(side for value in state.values() for side in value.shape)])
    for number in _numbers(config):
        if not math.isfinite(number) or abs(number) > bound:
            raise ModelError(f"its configuration has {number!r:.60}, its weights no such size", remedy=DAMAGED)


def _numbers(value: object) -> Iterator[float]:
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from _numbers(item)
    elif isinstance(value, int | float):
        yield value


class OtherEncoder(Encoder):
    """Encode by another project's module.

    Args:
        towers: the module, with a `logit_scale` and perhaps a `logit_bias`.
    """

    def __init__(self, towers: Any) -> None:  # noqa: ANN401  (the project's)
        super().__init__()
        self.towers = towers

    @property
    def logit_scale(self) -> Tensor:  # type: ignore[override]
        """Logarithm of the scale of the cosines."""
        scale: Tensor = self.towers.logit_scale
        return scale

    @property
    def logit_bias(self) -> Tensor | None:
        """What a sigmoid loss adds to the scaled cosines; None for a softmax."""
        bias: Tensor | None = self.towers.logit_bias
        return bias


class OtherTokenizer:
    """Turn texts into ids of the whole context length.

    Args:
        context_length: L, in tokens.
        name: on the Hub, where none lies in the folder; empty for CLIP's vocabulary.
        options: OpenCLIP's `tokenizer_kwargs`, from a file; None leaves texts as they are.
        folder: with the tokenizer's files.
    """

    def __init__(self, *, context_length: int, name: str, options: Mapping[str, Any] | None, folder: Path) -> None:
        self._context_length, self._name, self._options, self._folder = context_length, name, options, folder

    @cached_property
    def _theirs(self) -> Any:  # noqa: ANN401  (transformers')
        wrong = next((key for key in self._options or () if key not in _TOKENIZER_OPTIONS), None)
        if wrong is not None or not _TOKENIZER_NAME.fullmatch(self._name):
            what = f"option {wrong!r:.60}" if wrong is not None else f"name {self._name!r:.60}"
            raise ModelError(f"its tokenizer has the {what}, which declip does not pass on", remedy=DAMAGED)
        is_here = any((self._folder / file).is_file() for file in _TOKENIZER_FILES)
        source = str(self._folder) if is_here else self._name
        kind = imported("transformers").AutoTokenizer
        try:
            return kind.from_pretrained(source, trust_remote_code=False, local_files_only=True)
        except Exception as error:  # a damaged file can raise anything
            raise ModelError(
                f"no tokenizer {self._name} can be read in {self._folder} or the cache of the Hub: "
                f"{' '.join(str(error).split()):.200}",
                remedy="copy tokenizer.json and tokenizer_config.json into the folder, or fetch it: python -c "
                f"\"import transformers; transformers.AutoTokenizer.from_pretrained('{self._name}')\"",
            ) from error

    def _cleaned(self, texts: Sequence[str]) -> list[str]:
        if self._options is None:
            return list(texts)
        clean = imported("open_clip").tokenizer.get_clean_fn(self._options.get("clean", "whitespace"))
        return [clean(text) for text in texts]

    def encode(self, texts: Sequence[str]) -> Tensor:
        """Turn N texts into ids, int64, (N, L); what is too long is cut.

        Raises:
            ModelError: the tokenizer's files are missing or damaged.

        Source: open_clip/tokenizer.py, `HFTokenizer`.
        """
        if not self._name:
            return Tokenizer(self._context_length).encode(texts)
        ids: Tensor = self._theirs(
            self._cleaned(texts),
            max_length=self._context_length,
            padding="max_length",
            truncation=True,
            return_tensors="pt",
        ).input_ids
        if (self._options or {}).get("strip_sep_token"):
            ids = ids.masked_fill(ids == self._theirs.sep_token_id, 0)
        return ids

    def count_truncated(self, texts: Sequence[str]) -> int:
        """Count the texts that are longer than the context."""
        if not self._name:
            own = Tokenizer(self._context_length)
            own.encode(texts)
            return own.num_truncated
        rows = self._theirs(self._cleaned(texts), truncation=False, verbose=False).input_ids
        return sum(len(row) > self._context_length for row in rows)


def imported(package: str) -> Any:  # noqa: ANN401
    """Import another project's package.

    Raises:
        ModelError: it is not installed.
    """
    if importlib.util.find_spec(package) is None:
        raise ModelError(f"this model needs {package}, which is not installed", remedy=_INSTALL)
    return importlib.import_module(package)
