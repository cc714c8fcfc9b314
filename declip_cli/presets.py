"""What settings are where nobody made them: the switches of a method by its mode, the order of the data."""

import math
from dataclasses import replace
from typing import Any

from declip_cli.config import DataConfig, MethodConfig

PRESETS: dict[bool, dict[str, dict[str, Any]]] = {
    False: {
        "method": {
            "nn_symmetric": True,
            "nn_exclude_own": False,
            "queue_start": "empty",
            "queue_scope": "global",
            "mlm_mean": "global",
            "mask_special_ids": False,
            "score_padding": False,
            "filip_text": "plain",
            "cap_logit_scale": False,
            "batch_norm": "global",
            "freeze_patch_embed": False,
        },
        "optim": {"decayed": "matrices", "gradient_clip_norm": 1.0},
        "train": {"logit_scale_min": 0.0, "logit_scale_max": math.log(100.0)},
    },
    True: {
        "method": {
            "nn_symmetric": False,
            "nn_exclude_own": False,
            "queue_start": "random",
            "queue_scope": "rank",
            "mlm_mean": "rank",
            "mask_special_ids": True,
            "score_padding": True,
            "filip_text": "masked",
            "cap_logit_scale": True,
            "batch_norm": "rank",
            "freeze_patch_embed": True,
        },
        "optim": {"decayed": "original", "gradient_clip_norm": math.inf},
        "train": {"logit_scale_min": 3.0, "logit_scale_max": 6.0},
    },
}
"""What `method.faithful` = false or true puts in the place of None: section → key → value.

Source of the faithful values: the original code, as held by the recorded values in the tests; its recipes' `grad_clip:
logit_scale_param_value`. Bounds of the logit scale by default: OpenCLIP and SLIP.

`nn_exclude_own` matters only where an epoch has fewer texts than the queue has rows; else own captions have left the
queue when their pair returns. On 1,817 pairs of the demo corpus (queue 65,536, 46,080 samples, means of six seeds),
95 % of the neighbours end up being own captions, yet leaving them out costs 0.8 points of zero-shot top-1, 1.1 of
top-5 and 0.8 of text-to-image recall at 10 (standard errors 0.4, 0.4 and 0.2). So they stay, as in the original.
"""


def settle_method(config: MethodConfig) -> MethodConfig:
    """Put the preset's values in the place of None; what is settled already stays."""
    preset = PRESETS[config.faithful]["method"]
    return replace(config, **{key: value for key, value in preset.items() if getattr(config, key) is None})


def settle_data(config: DataConfig, num_blocks: int, global_batch: int, *, suits_blocks: bool) -> DataConfig:
    """Choose the order of the pairs.

    Args:
        config: what was asked.
        num_blocks: of the data.
        global_batch: pairs per step on all processes together.
        suits_blocks: what to choose where nothing was asked.

    Returns:
        The same with `order` and `streams` settled.
    """
    # Equal shares of each batch, and enough blocks in each stream that few are shared between two.
    most = max(1, num_blocks // 8)
    streams = max(num for num in (1, 2, 4, 8, 16, 32, 64) if num <= most and global_batch % num == 0)
    order = config.order or ("blocks" if suits_blocks else "exact")
    return replace(config, order=order, streams=config.streams or streams)
