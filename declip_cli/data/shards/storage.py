"""The old place of `declip_cli.data.storage`."""

from declip_cli.data.storage import *  # noqa: F403
