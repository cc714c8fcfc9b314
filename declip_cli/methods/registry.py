"""Names of methods, and how one is put together."""

from declip_cli.config import MethodConfig, ModelConfig
from declip_cli.methods.aclip import AClip
from declip_cli.methods.base import Method
from declip_cli.methods.clip import Clip
from declip_cli.methods.declip import DeClip
from declip_cli.methods.defilip import DeFilip
from declip_cli.methods.filip import Filip
from declip_cli.methods.rocket import Rocket
from declip_cli.methods.slip import Slip
from declip_cli.model.architectures import find_architecture
from declip_cli.model.clip import DualEncoder
from declip_cli.model.heads import TOKEN_WISE_DIM

METHODS: dict[str, type[Method]] = {
    "clip": Clip,
    "slip": Slip,
    "filip": Filip,
    "declip": DeClip,
    "defilip": DeFilip,
    "rocket": Rocket,
    "aclip": AClip,
}


def build_method(model: ModelConfig, method: MethodConfig) -> Method:
    """Make a dual encoder with random weights and put a method around it.

    Args:
        model: architecture and its overrides.
        method: objective and its options.

    Returns:
        The module to train.

    Raises:
        ConfigError: an unknown architecture or loss term.
    """
    kind = METHODS[method.name]
    encoder = DualEncoder(find_architecture(model), token_wise_dim=TOKEN_WISE_DIM if kind.is_token_wise else 0)
    encoder.set_gradient_checkpointing(model.gradient_checkpointing)
    return kind(encoder, method)
