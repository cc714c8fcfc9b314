"""Data-efficient language-image pre-training, from the command line; from Python: `load`."""

from typing import Any

__version__ = "0.1.0"


def load(path: Any = None, **options: Any) -> Any:  # noqa: ANN401  (its types need torch; see interop.load)
    """Open a model as `(model, preprocess, tokenizer)`; see `declip_cli.interop.load.load`."""
    from declip_cli.interop.load import load as load_here  # torch is imported when it is needed

    return load_here(path, **options)
