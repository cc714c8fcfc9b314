"""A model as two ONNX graphs, images and texts → embeddings of unit length, for any runtime."""

import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from declip_cli import __version__
from declip_cli.data.tokenizer import Tokenizer
from declip_cli.files import write_json
from declip_cli.interop.export_hugging_face import processor_config, write_tokenizer
from declip_cli.interop.sample import Embedded, Sample, views_of
from declip_cli.model.checkpoint import PretrainedModel
from declip_cli.model.clip import DualEncoder, normalize
from declip_cli.model.preprocessing import read_preprocessing

IMAGE_FILE = "image_encoder.onnx"
TEXT_FILE = "text_encoder.onnx"
_NUM_TRACED = 2
"""Images or texts that a graph is traced with; a size of 1 would count as fixed."""
_LARGEST_FILE = 2 * 10**9
"""Bytes of weights that fit into one file of protocol buffers; more go into a file beside it."""


class _ImageGraph(nn.Module):
    """Uint8 (B, S, S, 3) → (B, D), or (B, P, Q) token by token."""

    def __init__(self, encoder: DualEncoder, *, token_wise: bool) -> None:
        super().__init__()
        self.encoder, self.token_wise = encoder, token_wise

    def forward(self, pixels: Tensor) -> Tensor:
        """Embed, to unit length."""
        encode = self.encoder.encode_image_tokens if self.token_wise else self.encoder.encode_image
        return normalize(encode(pixels))


class _TextGraph(nn.Module):
    """Ids (B, L) → (B, D), or (B, L, Q) and which tokens count, (B, L)."""

    def __init__(self, encoder: DualEncoder, *, token_wise: bool) -> None:
        super().__init__()
        self.encoder, self.token_wise = encoder, token_wise

    def forward(self, input_ids: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Embed, to unit length."""
        if not self.token_wise:
            return normalize(self.encoder.encode_text(input_ids))
        tokens, mask = self.encoder.encode_text_tokens(input_ids)
        return normalize(tokens), mask


def why_not(model: PretrainedModel) -> str:
    """Return nothing: a graph can express every model."""
    return ""


def write(model: PretrainedModel, folder: Path) -> None:
    """Write both graphs, with any number of images and texts and any length of these, and the tokenizer's files.

    Images enter as bytes, normalization is inside. What else a runtime needs is in the graphs' metadata.
    """
    side, is_token_wise = model.preprocessing.image_side_px, model.token_wise
    pixels = torch.zeros(_NUM_TRACED, side, side, 3, dtype=torch.uint8)
    tokens = Tokenizer(model.context_length).encode(["a", "a b c"], pad_to_context=False)  # (2, 5)
    batch = torch.export.Dim("batch")
    length = torch.export.Dim("length", min=2, max=model.context_length)
    image_outputs = ["image_token_embeds" if is_token_wise else "image_embeds"]
    text_outputs = ["text_token_embeds", "text_token_mask"] if is_token_wise else ["text_embeds"]
    image_graph = _ImageGraph(model.towers, token_wise=is_token_wise).eval()
    text_graph = _TextGraph(model.towers, token_wise=is_token_wise).eval()
    metadata = _metadata(model)
    _write_graph(image_graph, pixels, {"pixels": {0: batch}}, image_outputs, metadata, folder / IMAGE_FILE)
    dynamic = {"input_ids": {0: batch, 1: length}}
    _write_graph(text_graph, tokens, dynamic, text_outputs, metadata, folder / TEXT_FILE)
    write_json(folder / "preprocessor_config.json", processor_config(model.preprocessing))
    write_tokenizer(folder, model.context_length)


def _metadata(model: PretrainedModel) -> dict[str, str]:
    bias = model.towers.logit_bias
    values: dict[str, Any] = {
        "declip_version": __version__,
        "method": model.method,
        "token_wise": model.token_wise,
        "context_length": model.context_length,
        "logit_scale": float(model.encoder.logit_scale.detach().exp()),
        "preprocessing": model.preprocessing.to_json(),
    }
    values |= {"logit_bias": float(bias.detach())} if bias is not None else {}
    return {name: value if isinstance(value, str) else json.dumps(value) for name, value in values.items()}


def _write_graph(
    graph: nn.Module,
    example: Tensor,
    dynamic: dict[str, dict[int, Any]],
    outputs: list[str],
    metadata: dict[str, str],
    path: Path,
) -> None:
    with torch.no_grad(), _quiet():
        program = torch.onnx.export(
            graph,
            (example,),
            dynamo=True,
            dynamic_shapes=dynamic,
            input_names=list(dynamic),
            output_names=outputs,
            verbose=False,
        )
    assert program is not None
    program.model.metadata_props.update(metadata)
    num_bytes = sum(value.nbytes for value in graph.state_dict().values())
    program.save(path, external_data=num_bytes > _LARGEST_FILE)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's remarks on its own workings from the user."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def embed(folder: Path, sample: Sample) -> Embedded:
    """Let onnxruntime encode a sample with what it reads from a folder, in batches of several sizes and lengths."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    images, texts = (
        onnxruntime.InferenceSession(folder / name, options, providers=["CPUExecutionProvider"])
        for name in (IMAGE_FILE, TEXT_FILE)
    )
    metadata = images.get_modelmeta().custom_metadata_map
    preprocessing = read_preprocessing(json.loads(metadata["preprocessing"]), remedy="export again")
    views = views_of(sample.images, preprocessing).numpy()  # (N, S, S, 3)
    ids = Tokenizer(int(metadata["context_length"])).encode(list(sample.texts)).numpy()  # (M, L)
    lengths = (ids != 0).cumsum(1).argmax(1) + 1  # of each text: the end is the last that is not padding
    found_images = [images.run(None, {"pixels": part})[0] for part in (views[:1], views[1:]) if len(part)]
    found_texts = []
    for part in np.array_split(np.argsort(lengths, kind="stable"), 3):  # numbers of short, middling and long texts
        for index, *row in zip(part, *texts.run(None, {"input_ids": ids[part, : lengths[part].max()]}), strict=True):
            found_texts.append((index, row[0][row[1]] if len(row) > 1 else row[0][None]))
    in_order = [row for _, row in sorted(found_texts, key=lambda pair: int(pair[0]))]
    return Embedded(
        images=torch.from_numpy(np.concatenate(found_images)), texts=torch.from_numpy(np.concatenate(in_order))
    )
